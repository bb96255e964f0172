import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from parse.engines.native.kernels import MIN_MULTIPLICATIONS, MIN_WEIGHT_ELEMENTS, optimize_modules, padded_num_tokens


def _with_random_weights(norm: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    for weight in norm.parameters():
        nn.init.normal_(weight, 1.0, 0.3)
    return nn.Sequential(norm.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm])
def test_a_fused_norm_gives_what_the_library_gives(kind, dtype):
    norm = _with_random_weights(kind(24, eps=1e-5), dtype)
    x = torch.randn(1, 7, 24).to(dtype) * 5
    expected = norm(x)
    assert optimize_modules(norm) == 1
    torch.testing.assert_close(norm(x), expected)


def test_a_norm_of_another_kind_stays_as_it_is():
    class DoublingRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    for norm in (
        _with_random_weights(DoublingRMSNorm(8), torch.float32),
        _with_random_weights(Gemma3RMSNorm(8), torch.float32),
    ):
        x = torch.randn(1, 3, 8)
        expected = norm(x)
        assert optimize_modules(norm) == 0
        assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("tokens", [1, 3, 40, 500])
@pytest.mark.parametrize("inside, outside", [(48, 32), (512, MIN_WEIGHT_ELEMENTS // 512 + 1)])
def test_a_packed_layer_gives_what_the_plain_one_gives(inside, outside, tokens):
    assert 40 * 48 * 32 < MIN_MULTIPLICATIONS < 500 * 48 * 32, "a small layer is tested with both kernels"
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(inside, outside), nn.Linear(outside, inside, bias=False))
    x = torch.randn(1, tokens, inside)
    expected = layers(x)
    assert optimize_modules(layers) == 2
    torch.testing.assert_close(layers(x), expected, rtol=1e-4, atol=1e-4)


def test_padding_gives_few_sizes_and_adds_few_tokens():
    sizes = {tokens: padded_num_tokens(tokens) for tokens in range(1, 513)}
    assert len(set(sizes.values())) < 50
    assert all(tokens <= size <= 1.42 * tokens for tokens, size in sizes.items())
    assert all(size <= 1.25 * tokens for tokens, size in sizes.items() if tokens > 30)


def test_a_shared_weight_stays_in_place():
    embedding = nn.Embedding(1024, 512)
    head, alone = nn.Linear(512, 1024, bias=False), nn.Linear(512, 1024)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head, alone])
    before = embedding.weight.clone()
    assert optimize_modules(model) == 2
    assert torch.equal(embedding.weight, before)
    assert alone.weight.shape == (1024, 512) and alone.weight.isnan().all()
    assert alone.weight.untyped_storage().nbytes() == 4


def test_layers_of_another_kind_or_precision_stay_as_they_are():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8).to(torch.bfloat16))
    assert optimize_modules(layers) == 0
    assert optimize_modules(nn.Sequential(nn.Linear(8, 8)), linears=False) == 0
