import itertools
import json
import logging
import math

import pytest
import torch

from parse.engines.native import kernel_selection
from parse.engines.native.kernel_selection import TOKEN_COUNTS, build_forward, choose, planned_kernels, select_kernels
from parse.engines.native.linear_kernels import KERNELS, LinearKernel, available_kernels
from parse.engines.native.plan_store import FilePlanStore, ModelPlan
from tests.parse.engines.native.tiny import build


def seconds(**by_name):
    return {name: dict(zip(TOKEN_COUNTS, times, strict=True)) for name, times in by_name.items()}


def test_the_fastest_kernel_is_chosen():
    assert choose(seconds(torch=[3] * 7, onednn=[2] * 7, mkl=[1] * 7)) == ("mkl",) * 7


def test_a_second_kernel_is_used_only_if_it_is_worth_its_copy_of_the_weight():
    slightly = choose(seconds(torch=[0.95, *[2] * 6], mkl=[1] * 7))
    assert slightly == ("mkl",) * 7
    clearly = choose(seconds(torch=[0.5, *[2] * 6], mkl=[1] * 7))
    assert clearly == ("torch", *["mkl"] * 6)


def test_a_large_model_has_one_kernel_per_layer(monkeypatch):
    times = seconds(torch=[0.5, *[2] * 6], mkl=[1] * 7)
    assert choose(times, allow_second=False) == ("mkl",) * 7
    monkeypatch.setattr(kernel_selection, "_time_kernels", lambda layers, deadline: times)
    layers = {(64, 32): [torch.randn(64, 32)]}
    assert select_kernels(layers)[64, 32] == ("torch", *["mkl"] * 6)
    monkeypatch.setattr(kernel_selection, "MAX_DUPLICATED_BYTES", 64 * 32 * 4 - 1)
    assert select_kernels(layers)[64, 32] == ("mkl",) * 7


def test_two_kernels_are_those_with_the_least_time_together():
    """Compared with all subsets of one and two kernels."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        times = (torch.rand(3, len(TOKEN_COUNTS), generator=generator) + 0.2).tolist()
        choice = choose(seconds(**dict(zip(["torch", "onednn", "mkl"], times, strict=True))))
        by_name = dict(zip(["torch", "onednn", "mkl"], times, strict=True))

        def product(names, by_name=by_name):
            return math.prod(min(by_name[name][index] for name in names) for index in range(len(TOKEN_COUNTS)))

        best_pair = min(map(product, itertools.combinations(by_name, 2)))
        best_single = min(product([name]) for name in by_name)
        used = math.prod(by_name[name][index] for index, name in enumerate(choice))
        assert used == pytest.approx(best_pair if best_pair < best_single * 0.97 ** len(TOKEN_COUNTS) else best_single)


def test_a_number_that_was_not_timed_gets_the_kernel_of_the_next_larger_one():
    timed = {"torch": {1: 1.0, 8: 4.0}, "mkl": {1: 2.0, 8: 1.0}}
    assert choose(timed) == ("torch", *["mkl"] * 6)


def test_all_shapes_get_kernels_of_this_machine(monkeypatch):
    monkeypatch.setattr(kernel_selection, "TIME_LIMIT_S", 0.2)
    layers = {(64, 32): [torch.randn(64, 32) for _ in range(3)], (32, 64): [torch.randn(32, 64)]}
    choices = select_kernels(layers)
    assert choices.keys() == layers.keys()
    for choice in choices.values():
        assert len(choice) == len(TOKEN_COUNTS) and set(choice) <= set(available_kernels(torch.float32))


def test_large_layers_are_timed_with_few_numbers_of_tokens(monkeypatch):
    timed = []
    monkeypatch.setattr(kernel_selection, "TIME_LIMIT_S", 0.0)

    def record(forwards, x, deadline):
        timed.append(x.shape[1])
        return dict.fromkeys(forwards, 1.0)

    monkeypatch.setattr(kernel_selection, "_best_passes", record)
    select_kernels({(64, 32): [torch.randn(64, 32)]})
    assert timed == [1, 8]


@pytest.mark.parametrize("tokens, name", [(1, "torch"), (2, "torch"), (3, "mkl"), (256, "mkl"), (1000, "mkl")])
def test_the_kernel_depends_on_the_number_of_tokens(tokens, name, monkeypatch):
    def build(kernel):
        return lambda weight, bias: lambda x: kernel

    for kernel in ("torch", "mkl"):
        monkeypatch.setitem(KERNELS, kernel, LinearKernel(build(kernel), reads_weight=kernel == "torch"))
    forward, reads_weight = build_forward(("torch", "torch", *["mkl"] * 5), torch.randn(4, 8), None)
    assert forward(torch.randn(1, tokens, 8)) == name
    assert reads_weight


def test_a_plan_is_measured_once(tmp_path, monkeypatch):
    layers = {(64, 32): [torch.randn(64, 32)]}
    network = build("llama")
    first = planned_kernels(ModelPlan.of(network, store=FilePlanStore(tmp_path)), layers)
    monkeypatch.setattr(kernel_selection, "select_kernels", lambda weights: pytest.fail("timed again"))
    assert planned_kernels(ModelPlan.of(network, store=FilePlanStore(tmp_path)), layers) == first


def test_kernels_that_this_machine_does_not_have_are_not_used(tmp_path, caplog):
    layers = {(64, 32): [torch.randn(64, 32)], (32, 64): [torch.randn(32, 64)]}
    store = FilePlanStore(tmp_path)
    plan = ModelPlan.of(build("llama"), store=store)
    plan.get_or_create("kernels", lambda: {"64x32": ["unknown"] * len(TOKEN_COUNTS)})
    with caplog.at_level(logging.WARNING):
        choices = planned_kernels(plan, layers)
    assert set(choices.values()) == {("torch",) * len(TOKEN_COUNTS)}
    assert "(64, 32)" in caplog.text and "(32, 64)" in caplog.text
    assert json.loads(store.path(plan.key).read_text())["sections"]["kernels"] == {"64x32": ["unknown"] * 7}
