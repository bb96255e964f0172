"""Replaces layers of a loaded model by faster kernels.

A kernel is used only if a comparison at load confirms that it gives the same results.

A root-mean-square norm becomes one operation. `transformers` uses seven, and with small batches the launch of an
operation dominates its cost. On CPUs, linear layers get the kernels of a plan.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedModel

from parse.engines.native.int8 import quantize_linears
from parse.engines.native.kernel_selection import KernelChoice, Shape, build_forward, planned_kernels
from parse.engines.native.linear_kernels import Forward
from parse.engines.native.plan_store import ModelPlan
from parse.engines.native.projections import LinearGroup, group_linears

logger = logging.getLogger(__name__)

ROUNDING = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}  # allowed relative difference; the library rounds one more intermediate result than the kernels
COMPARED_TOKENS = 1, 8, 40


def optimize_network(network: PreTrainedModel, plan: ModelPlan | None) -> None:
    """Replaces the forward functions of norms and, if there is a plan, of the linear layers on a CPU.

    The plan also says whether these are quantized.
    """
    optimize_norms(network)
    if plan is None or plan.key.device != "cpu":
        return
    if plan.key.quantization == "int8":
        quantize_linears(network)
    else:
        optimize_linears(network, partial(planned_kernels, plan))


@torch.inference_mode()
def optimize_norms(network: nn.Module) -> int:
    """Replaces the forward functions of norms. Returns how many were replaced."""
    return sum(_replace_norm(module) for module in network.modules() if type(module).__name__.endswith("RMSNorm"))


@torch.no_grad()
def optimize_linears(
    network: PreTrainedModel, select: Callable[[Mapping[Shape, Sequence[Tensor]]], Mapping[Shape, KernelChoice]]
) -> None:
    """Joins the linear layers of a network on a CPU that have the same input, and replaces their forward functions.

    `select` returns the kernels for each shape, given the weights of the layers of this shape.

    A shape for which no kernel was selected uses PyTorch's `linear`.
    """
    groups = group_linears(network)
    weights: dict[Shape, list[Tensor]] = {}
    for group in groups:
        weights.setdefault(group.shape, []).append(group.weight)
    choices = select(weights)
    compared: set[Shape] = set()
    for group in groups:
        choice = choices.get(group.shape, ("torch",))
        forward, reads_weight = build_forward(choice, group.weight, group.bias)
        # One layer of a shape shows that its kernels are right for all sizes. The others are compared only briefly.
        if not _agrees(group, forward, COMPARED_TOKENS[:1] if group.shape in compared else COMPARED_TOKENS):
            logger.warning("a layer of shape %s differs with its kernels %s, and uses linear", group.shape, choice)
            forward, reads_weight = build_forward(("torch",), group.weight, group.bias)
        compared.add(group.shape)
        group.set_forward(forward, keep_weight=reads_weight)


def _agrees(group: LinearGroup, forward: Forward, counts: Sequence[int]) -> bool:
    return all(
        _is_close(forward(x), linear(x, group.weight, group.bias))
        for x in (_example_input(group.weight, count) for count in counts)
    )


def _replace_norm(module: nn.Module) -> bool:
    """Replaces the forward function of a norm if the fused one gives the same results.

    For example, some norms add one to their weight. These keep their own function.
    """
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return False
    shape = tuple(weight.shape)

    def fused(x: Tensor) -> Tensor:
        return rms_norm(x, shape, weight, epsilon)

    x = _example_input(weight, 3)
    try:
        expected = module(x)
    except TypeError:  # the module takes further arguments
        return False
    if expected.dtype != x.dtype or not _is_close(fused(x), expected):
        return False
    module.forward = fused
    return True


def _example_input(weight: Tensor, tokens: int) -> Tensor:
    """Returns inputs of a layer, [1, tokens, size]."""
    size = weight.shape[-1]
    return torch.linspace(-2.0, 3.0, tokens * size, device=weight.device).to(weight.dtype).view(1, tokens, size)


def _is_close(output: Tensor, expected: Tensor) -> bool:
    bound = ROUNDING.get(expected.dtype, 0.0) * max(1.0, float(expected.abs().max()))
    return torch.allclose(output, expected, rtol=bound, atol=bound)
