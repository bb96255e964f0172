"""Replaces layers of a loaded model by faster kernels.

A kernel is used only if a comparison at load confirms that it gives the same results.

A root-mean-square norm becomes one operation. `transformers` uses seven, and with small batches the launch of an
operation dominates its cost.

On CPUs, linear layers in float32 store their weights in the order in which oneDNN reads them. PyTorch's `linear` does
not reorder them. On the machine where it was measured (AVX-512, AMD), the kernel took 0.4 to 0.5 of the time of
`linear` for 64 tokens and more. For a single token it took 0.5 to 0.7 of the time, if the weights did not fit into the
cache. oneDNN compiles a kernel for each number of tokens, which takes 0.4 ms and 0.6 MB, so the numbers are rounded up
to a few sizes.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm

ROUNDING = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}  # allowed relative difference; the library rounds one more intermediate result than the kernels
MIN_MULTIPLICATIONS = 1 << 19  # below this number, a call of oneDNN costs more than it saves
MIN_WEIGHT_ELEMENTS = 1 << 18  # from this size on, even a single token is faster

Forward = Callable[[Tensor], Tensor]


@torch.inference_mode()
def optimize_modules(network: nn.Module, *, linears: bool = True) -> int:
    """Replaces the forward functions of a network's modules.

    Returns how many functions were replaced.
    """
    shared = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    can_pack = linears and _can_pack()
    changed = 0
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            changed += _replace_forward(module, _fused_norm(module))
        elif can_pack and type(module) is nn.Linear and module.weight.dtype == torch.float32:
            if not module.weight.is_cpu:
                continue
            packed = _PackedLinear(module)
            if _replace_forward(module, packed.forward):
                changed += 1
                if shared[id(module.weight)] == 1:
                    packed.release_weight(module)
    return changed


def _replace_forward(module: nn.Module, forward: Forward | None) -> bool:
    """Replaces a forward function if the new one gives the same results.

    For example, some norms add one to their weight. These keep their own function.
    """
    if forward is None:
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    x = torch.linspace(-2.0, 3.0, 3 * weight.shape[-1], device=weight.device).to(weight.dtype).view(1, 3, -1)
    try:
        expected = module(x)
    except TypeError:  # the module takes further arguments
        return False
    bound = ROUNDING.get(weight.dtype, 0.0) * max(1.0, float(expected.abs().max()))
    if expected.dtype != x.dtype or not torch.allclose(forward(x), expected, rtol=bound, atol=bound):
        return False
    module.forward = forward
    return True


def _fused_norm(module: nn.Module) -> Forward | None:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return None
    shape = tuple(weight.shape)
    return lambda x: rms_norm(x, shape, weight, epsilon)


def _can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def padded_num_tokens(tokens: int) -> int:
    """Rounds a number of tokens up to one of a few dozen sizes.

    Numbers up to 16 are not changed.
    """
    if tokens <= 16:
        return tokens
    step = 8 if tokens <= 64 else 16 if tokens <= 256 else 32
    return -(-tokens // step) * step


class _PackedLinear:
    def __init__(self, module: nn.Linear) -> None:
        self.weight: Tensor | None = module.weight
        self.bias, self.width = module.bias, module.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, None)
        self.is_large = module.weight.numel() >= MIN_WEIGHT_ELEMENTS

    def forward(self, x: Tensor) -> Tensor:
        if self.is_large or x.numel() * self.width >= MIN_MULTIPLICATIONS:
            tokens = x.shape[-2]
            padding = padded_num_tokens(tokens) - tokens if x.numel() == tokens * x.shape[-1] else 0
            padded = pad(x, (0, 0, 0, padding)) if padding else x
            out: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self.packed, self.bias, "none", [], "")
            return out.narrow(-2, 0, tokens) if padding else out
        assert self.weight is not None
        return linear(x, self.weight, self.bias)

    def release_weight(self, module: nn.Linear) -> None:
        """Frees the unpacked weight of a large layer.

        The weight is replaced by NaN, so any accidental use is visible.
        """
        if self.is_large:
            placeholder = module.weight.new_full((1, 1), torch.nan).expand(module.weight.shape)
            module.weight = nn.Parameter(placeholder, requires_grad=False)
            self.weight = None
