import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from parse.engine.norms import fuse_norms


def _with_weights(norm: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    for weight in norm.parameters():
        nn.init.normal_(weight, 1.0, 0.3)
    return nn.Sequential(norm.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm])
def test_a_fused_norm_gives_what_the_library_gives(kind, dtype):
    norm = _with_weights(kind(24, eps=1e-5), dtype)
    x = torch.randn(1, 7, 24).to(dtype) * 5
    expected = norm(x)
    assert fuse_norms(norm) == 1
    torch.testing.assert_close(norm(x), expected)


def test_a_norm_of_another_kind_stays_as_it_is():
    class DoublingRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    for norm in (_with_weights(DoublingRMSNorm(8), torch.float32), _with_weights(Gemma3RMSNorm(8), torch.float32)):
        x = torch.randn(1, 3, 8)
        expected = norm(x)
        assert fuse_norms(norm) == 0
        assert torch.equal(norm(x), expected)
