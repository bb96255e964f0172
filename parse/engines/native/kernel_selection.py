"""Chooses the kernels of a model's linear layers by timing them on this machine.

The kernel of a layer depends on the number of tokens that a step computes. The choice is made once and then kept in a
plan (`plan_store.py`), because kernels round differently, and a request that is repeated elsewhere must not get another
text. Timing never chooses the dtype.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor

from parse.engines.native.linear_kernels import KERNELS, Forward, available_kernels
from parse.engines.native.plan_store import ModelPlan

logger = logging.getLogger(__name__)

TOKEN_COUNTS = 1, 2, 4, 8, 16, 64, 256
TIMING_ORDER = 1, 8, 64, 16, 4, 2, 256
"""The most frequent numbers first, because large layers do not leave time for all of them."""
ALWAYS_TIMED = frozenset((1, 8))  # even if there is no time left; they show whether a kernel suits few tokens
TIME_LIMIT_S = 1.0  # for all layers of a model together
MIN_PASSES, MAX_PASSES = 3, 20
# Small layers are timed for at least this long, because the noise of one pass exceeds the difference between kernels.
PASSES_TIME_S = 0.01
# A weight that stays in the processor's cache is read faster than in a real step, so as many layers of one shape take
# turns as exceed this size together.
SAMPLE_BYTES = 16 * 2**20
MAX_SAMPLE_LAYERS = 64
# A layer with two kernels has two copies of its weight. They have to be worth it.
MIN_GAIN_OF_SECOND_KERNEL = 0.03
MAX_DUPLICATED_BYTES = 2**30  # models with larger linear layers keep a single copy, so that they fit into memory

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""
KernelChoice = tuple[str, ...]
"""The name of a kernel for each number in `TOKEN_COUNTS`."""


def planned_kernels(plan: ModelPlan, weights: Mapping[Shape, Sequence[Tensor]]) -> dict[Shape, KernelChoice]:
    """Returns the kernels in the plan of a model. If it has none yet, they are timed."""
    if len({available_kernels(layers[0].dtype) for layers in weights.values()} - {("torch",)}) == 0:
        return {}
    names: Mapping[str, Sequence[str]] = plan.get_or_create(
        "kernels", lambda: {_shape_name(shape): choice for shape, choice in select_kernels(weights).items()}
    )
    choices = {}
    for shape, layers in weights.items():
        choice = tuple(names.get(_shape_name(shape), ()))
        if len(choice) != len(TOKEN_COUNTS) or not set(choice) <= set(available_kernels(layers[0].dtype)):
            logger.warning("the plan has no usable kernels for a layer of shape %s, so it uses linear", shape)
            choice = ("torch",) * len(TOKEN_COUNTS)
        choices[shape] = choice
        logger.info("linear layers of shape %s: %s", _shape_name(shape), describe(choice))
    return choices


def describe(choice: KernelChoice) -> str:
    """Returns which kernel computes how many tokens."""
    if len(set(choice)) == 1:
        return choice[0]
    return ", ".join(f"{count}: {name}" for count, name in zip(TOKEN_COUNTS, choice, strict=True))


def select_kernels(weights: Mapping[Shape, Sequence[Tensor]]) -> dict[Shape, KernelChoice]:
    """Times the kernels for each shape, with the weights of the model's layers of this shape.

    The largest weights come first. Each shape may take half of the time that is left.
    """
    end = time.perf_counter() + TIME_LIMIT_S
    allow_second = sum(layer.nbytes for layers in weights.values() for layer in layers) <= MAX_DUPLICATED_BYTES
    choices = {}
    for shape, layers in sorted(weights.items(), key=lambda item: -item[1][0].numel()):
        now = time.perf_counter()
        choices[shape] = choose(
            _time_kernels(_sample(layers), deadline=now + max(0.0, end - now) / 2), allow_second=allow_second
        )
    return choices


def choose(seconds: Mapping[str, Mapping[int, float]], *, allow_second: bool = True) -> KernelChoice:
    """Returns the kernel for each number of tokens, from the seconds that each kernel takes for some numbers.

    A number of tokens that was not timed gets the kernel of the next larger one that was, or of the largest.
    """
    counts = sorted(next(iter(seconds.values())))

    def slowness(names: Sequence[str]) -> float:
        """Returns the mean logarithm of the time of the fastest of these kernels."""
        return fmean(math.log(min(seconds[name][count] for name in names)) for count in counts)

    names: tuple[str, ...] = (min(seconds, key=lambda name: slowness((name,))),)
    best_pair = min(combinations(seconds, 2), key=slowness, default=names)
    if allow_second and slowness(best_pair) < slowness(names) + math.log1p(-MIN_GAIN_OF_SECOND_KERNEL):
        names = best_pair
    timed = {count: min(names, key=lambda name: seconds[name][count]) for count in counts}
    return tuple(timed[counts[min(bisect_left(counts, count), len(counts) - 1)]] for count in TOKEN_COUNTS)


def build_forward(choice: KernelChoice, weight: Tensor, bias: Tensor | None) -> tuple[Forward, bool]:
    """Returns the forward function of a layer, and whether it reads the weight itself."""
    names = sorted(set(choice))
    kernels = {name: KERNELS[name].build(weight, bias) for name in names}
    reads_weight = any(KERNELS[name].reads_weight for name in names)
    if len(kernels) == 1:
        return kernels[names[0]], reads_weight
    inputs, last = weight.shape[1], len(TOKEN_COUNTS) - 1
    by_count = [kernels[name] for name in choice]

    def forward(x: Tensor) -> Tensor:
        return by_count[min(bisect_left(TOKEN_COUNTS, x.numel() // inputs), last)](x)

    return forward, reads_weight


def _shape_name(shape: Shape) -> str:
    outputs, inputs = shape
    return f"{outputs}x{inputs}"


def _sample(layers: Sequence[Tensor]) -> Sequence[Tensor]:
    count = -(-SAMPLE_BYTES // layers[0].nbytes)
    return layers[: min(count, MAX_SAMPLE_LAYERS)]


def _time_kernels(layers: Sequence[Tensor], deadline: float) -> dict[str, dict[int, float]]:
    """Returns the seconds of each kernel for some numbers of tokens, always including 1."""
    forwards = {
        name: [KERNELS[name].build(layer, None) for layer in layers] for name in available_kernels(layers[0].dtype)
    }
    inputs = torch.randn(max(TOKEN_COUNTS), layers[0].shape[1]).to(layers[0].dtype)
    seconds: dict[str, dict[int, float]] = {name: {} for name in forwards}
    for tokens in TIMING_ORDER:
        smaller = max((count for count in seconds["torch"] if count < tokens), default=None)
        # Few tokens take hardly longer than one, because the time to read the weight dominates.
        growth = 1.0 if smaller is None else max(1.0, tokens / max(smaller, 8))
        expected = growth * sum(times[smaller] for times in seconds.values()) if smaller else 0.0
        # Passes over many tokens are limited by arithmetic, so that the processor's cache matters less.
        num_layers = len(layers) if tokens < 64 else min(len(layers), 2)
        if tokens not in ALWAYS_TIMED and time.perf_counter() + 2 * num_layers * expected > deadline:
            continue
        timed = {name: functions[:num_layers] for name, functions in forwards.items()}
        for name, best in _best_passes(timed, inputs[:tokens][None], deadline).items():
            seconds[name][tokens] = best / num_layers
    return seconds


def _best_passes(forwards: Mapping[str, Sequence[Forward]], x: Tensor, deadline: float) -> dict[str, float]:
    """Returns the seconds of the fastest pass of each kernel. The kernels take forwards."""
    best = dict.fromkeys(forwards, math.inf)
    for functions in forwards.values():
        functions[0](x)  # compiles the kernel
    first = time.perf_counter()
    for number in range(MAX_PASSES):
        now = time.perf_counter()
        if number and (now > deadline or (number >= MIN_PASSES and now > first + PASSES_TIME_S)):
            break
        for name, functions in forwards.items():
            began = time.perf_counter()
            for function in functions:
                function(x)
            best[name] = min(best[name], time.perf_counter() - began)
    return best
