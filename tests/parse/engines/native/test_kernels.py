import logging

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from parse.engines.native import projections
from parse.engines.native.kernel_selection import TOKEN_COUNTS
from parse.engines.native.kernels import optimize_linears, optimize_norms
from parse.engines.native.linear_kernels import KERNELS, LinearKernel, available_kernels
from tests.parse.engines.native.tiny import SERVED, VOCABULARY, build, plain


@pytest.fixture(autouse=True)
def join_small_layers(monkeypatch):
    monkeypatch.setattr(projections, "MIN_JOINED_ELEMENTS", 0)


PACKED_KERNELS = [name for name in available_kernels(torch.float32) if name != "torch"]
MIXED = ("torch", "torch", *[PACKED_KERNELS[-1] if PACKED_KERNELS else "torch"] * (len(TOKEN_COUNTS) - 2))


COPYING = ("copying",) * len(TOKEN_COUNTS)


@pytest.fixture(autouse=True)
def copying_kernel(monkeypatch):
    """A kernel that keeps a copy of the weight, as the packed ones do, on every machine."""

    def build_copying(weight, bias):
        copy = weight.clone()
        return lambda x: torch.nn.functional.linear(x, copy, bias)

    monkeypatch.setitem(KERNELS, "copying", LinearKernel(build_copying, reads_weight=False))


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
    assert optimize_norms(norm) == 1
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
        assert optimize_norms(norm) == 0
        assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    "choice", [*((name,) * len(TOKEN_COUNTS) for name in available_kernels(torch.float32)), MIXED], ids=lambda c: c[1:3]
)
@pytest.mark.parametrize("kind", SERVED)
def test_a_network_with_other_kernels_computes_what_the_library_computes(kind, choice):
    network = build(kind)
    sequences = [torch.arange(length).tolist() for length in (1, 2, 5, 40)]
    expected = [plain(network, sequence) for sequence in sequences]
    optimize_linears(network, lambda weights: dict.fromkeys(weights, choice))
    for sequence, logits in zip(sequences, expected, strict=True):
        torch.testing.assert_close(plain(network, sequence), logits, rtol=1e-4, atol=1e-3)


def test_layers_that_no_kernel_was_selected_for_use_the_one_of_the_library():
    network = build("llama")
    expected = plain(network, [5, 6, 7])
    optimize_linears(network, lambda weights: {})
    torch.testing.assert_close(plain(network, [5, 6, 7]), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_nobody_reads_is_freed():
    network = build("llama")
    layer, head = network.model.layers[0].self_attn, network.lm_head
    optimize_linears(network, lambda weights: dict.fromkeys(weights, COPYING))
    for module in (layer.q_proj, layer.v_proj, layer.o_proj, head):
        assert module.weight.shape == (module.out_features, module.in_features) and module.weight.isnan().all()
        assert module.weight.untyped_storage().nbytes() == 4


def test_a_weight_that_another_module_uses_stays_in_place():
    network = build("llama", tie_word_embeddings=True)
    before = network.model.embed_tokens.weight.clone()
    expected = plain(network, [5, 6, 7])
    optimize_linears(network, lambda weights: dict.fromkeys(weights, COPYING))
    assert torch.equal(network.model.embed_tokens.weight, before)
    torch.testing.assert_close(plain(network, [5, 6, 7]), expected, rtol=1e-4, atol=1e-3)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog):
    def build_wrong(weight, bias):
        return lambda x: torch.nn.functional.linear(x, weight, bias) * 1.001

    monkeypatch.setitem(KERNELS, "wrong", LinearKernel(build_wrong, reads_weight=False))
    network = build("llama")
    expected = plain(network, [5, 6, 7])
    with caplog.at_level(logging.WARNING):
        optimize_linears(network, lambda weights: dict.fromkeys(weights, ("wrong",) * len(TOKEN_COUNTS)))
    torch.testing.assert_close(plain(network, [5, 6, 7]), expected, rtol=1e-5, atol=1e-5)
    assert f"({VOCABULARY}, 32)" in caplog.text
