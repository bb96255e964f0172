"""Finds the linear layers of a network, and computes those with the same input as one.

Models apply several linear layers to one input: the projections to queries, keys and values, and the two projections of
a gated MLP. One layer with all their outputs reads the input once and needs fewer calls.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parse.engines.native.linear_kernels import Forward

PASS_TOKENS = 3
MIN_JOINED_ELEMENTS = 1 << 18  # of a joint weight; for smaller ones, handing out the outputs costs more than it saves


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that are computed together. Most groups have a single one."""

    modules: tuple[nn.Linear, ...]
    weight: Tensor
    """The weights of all modules, [outputs, inputs]."""
    bias: Tensor | None
    is_shared: bool
    """Whether another module uses the weight too, for example the input embedding."""

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def set_forward(self, forward: Forward, *, keep_weight: bool) -> None:
        """Lets the modules compute their outputs with a function that computes those of all of them.

        Unless it is kept, the weight is replaced by NaN, so any accidental use is visible.
        """
        forwards: tuple[Forward, ...] = (forward,)
        if len(self.modules) > 1:
            forwards = _SharedOutputs(forward, [module.out_features for module in self.modules]).forwards
        for module, module_forward in zip(self.modules, forwards, strict=True):
            module.forward = module_forward  # type: ignore[method-assign, assignment]
            if not keep_weight and not self.is_shared:
                placeholder = module.weight.new_full((1, 1), torch.nan).expand(module.weight.shape)
                module.weight = nn.Parameter(placeholder, requires_grad=False)


def group_linears(network: PreTrainedModel) -> list[LinearGroup]:
    """Returns all linear layers, and joins the weights of those that always get the same input.

    A short pass shows which these are. The modules keep their weights, which become views of the joint weight.
    """
    num_users = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    grouped = [
        modules
        for modules in _with_same_input(network)
        if all(num_users[id(module.weight)] == 1 for module in modules)
        and sum(module.weight.numel() for module in modules) >= MIN_JOINED_ELEMENTS
    ]
    in_group = {module for modules in grouped for module in modules}
    others = [(module,) for module in _linears(network) if module not in in_group]
    return [
        *(_join(modules) for modules in grouped),
        *(LinearGroup((m,), m.weight.detach(), _detached(m.bias), num_users[id(m.weight)] > 1) for (m,) in others),
    ]


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if type(module) is nn.Linear]


@dataclass(frozen=True)
class _Call:
    module: nn.Linear
    parent: str
    input: Tensor
    version: int  # of the input, which changes if it is modified in place


@torch.no_grad()
def _with_same_input(network: PreTrainedModel) -> list[tuple[nn.Linear, ...]]:
    """Returns the layers of one parent that read one unchanged tensor in direct succession.

    A layer that is called several times is left out.
    """
    calls: list[_Call] = []

    def record(parent: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            calls.append(_Call(module, parent, inputs[0], inputs[0]._version))

        return hook

    handles = [
        module.register_forward_pre_hook(record(name.rpartition(".")[0]))
        for name, module in network.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        network(input_ids=torch.arange(PASS_TOKENS)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    num_calls = Counter(call.module for call in calls)
    runs: list[list[_Call]] = []
    for call in calls:
        previous = runs[-1][-1] if runs else None
        if previous is not None and _can_join(previous, call):
            runs[-1].append(call)
        else:
            runs.append([call])
    groups = (tuple(call.module for call in run) for run in runs if len(run) > 1)
    return [modules for modules in groups if all(num_calls[module] == 1 for module in modules)]


def _can_join(one: _Call, other: _Call) -> bool:
    return (
        (one.parent, one.version) == (other.parent, other.version)
        and one.input is other.input
        and one.module.weight.dtype == other.module.weight.dtype
        and (one.module.bias is None) == (other.module.bias is None)
    )


def _join(modules: Sequence[nn.Linear]) -> LinearGroup:
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias.detach() for module in modules])
    for module, part in zip(modules, weight.split([module.out_features for module in modules]), strict=True):
        module.weight = nn.Parameter(part, requires_grad=False)
    return LinearGroup(tuple(modules), weight, bias, is_shared=False)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


class _SharedOutputs:
    """The outputs of several modules, which the first one that is called computes for all of them."""

    def __init__(self, forward: Forward, sizes: Sequence[int]) -> None:
        self._forward, self._sizes = forward, list(sizes)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # those that have not been read yet, by the number of the module

    @property
    def forwards(self) -> tuple[Forward, ...]:
        return tuple(self._make_forward(number) for number in range(len(self._sizes)))

    def _make_forward(self, number: int) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if x is not self._input or number not in self._outputs:
                self._input = x
                self._outputs = dict(enumerate(self._forward(x).split(self._sizes, -1)))
            output = self._outputs.pop(number)
            if not self._outputs:
                self._input = None
            return output

        return forward
