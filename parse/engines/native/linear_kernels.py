"""Kernels for the linear layers of a model on a CPU.

Which one is fastest depends on the processor, the size of the layer and the number of tokens, so
`kernel_selection.py` times them on the machine.

`torch` is PyTorch's `linear`. The others read the weight from a copy in the order in which they need it, which
`linear` creates again at each call. Layers with a packed kernel alone do not keep the original weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

Forward = Callable[[Tensor], Tensor]

# MKL lays out a packed weight for a number of tokens. It can be used with any other number as well, and was as fast
# with it, provided that it was laid out for many tokens.
MKL_PACKED_TOKENS = 1024


@dataclass(frozen=True)
class LinearKernel:
    """One way to compute a linear layer."""

    build: Callable[[Tensor, Tensor | None], Forward]
    """Returns the forward function for a weight, [outputs, inputs], and a bias."""
    reads_weight: bool
    """Whether the forward function reads the weight itself, and not a copy in another order."""


def _torch(weight: Tensor, bias: Tensor | None) -> Forward:
    return partial(linear, weight=weight, bias=bias)


def _onednn(weight: Tensor, bias: Tensor | None) -> Forward:
    """oneDNN compiles a kernel for each number of tokens, which takes 0.4 ms and 0.6 MB, so the numbers are rounded."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    compute = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        tokens = x.shape[-2]
        padding = padded_num_tokens(tokens) - tokens if x.numel() == tokens * x.shape[-1] else 0
        out: Tensor = compute(pad(x, (0, 0, 0, padding)) if padding else x, packed, bias, "none", [], "")
        return out.narrow(-2, 0, tokens) if padding else out

    return forward


def _mkl(weight: Tensor, bias: Tensor | None) -> Forward:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_PACKED_TOKENS)
    shape = weight.new_empty((1, 1)).expand(weight.shape)  # the operator reads only the shape of the weight
    compute, inputs = torch.ops.mkl._mkl_linear.default, weight.shape[1]

    def forward(x: Tensor) -> Tensor:
        out: Tensor = compute(x, packed, shape, bias, x.numel() // inputs)
        return out

    return forward


KERNELS = {
    "torch": LinearKernel(_torch, reads_weight=True),
    "onednn": LinearKernel(_onednn, reads_weight=False),
    "mkl": LinearKernel(_mkl, reads_weight=False),
}


def available_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """Returns the names of the kernels that this machine has for weights of this dtype."""
    names = ["torch"]
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_bfloat16 = has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if (has_onednn and dtype == torch.float32) or (has_bfloat16 and dtype == torch.bfloat16):
        names.append("onednn")
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear") and dtype == torch.float32:
        names.append("mkl")
    return tuple(names)


def padded_num_tokens(tokens: int) -> int:
    """Rounds a number of tokens up to one of a few dozen sizes.

    Numbers up to 16 are not changed.
    """
    if tokens <= 16:
        return tokens
    step = 8 if tokens <= 64 else 16 if tokens <= 256 else 32
    return -(-tokens // step) * step
