"""The size of the KV cache, with GPUs that are made up."""

from dataclasses import dataclass

import pytest
import torch

from parse.config import EngineSettings
from parse.engines.native.kv_cache_size import kv_cache_bytes

GIB = 2**30


@dataclass
class Weights:
    device: torch.device
    nbytes: int


class Network:
    def __init__(self, **gib_per_device):
        self.weights = [
            Weights(torch.device(name.replace("_", ":")), gib * GIB) for name, gib in gib_per_device.items()
        ]

    def parameters(self):
        return iter(self.weights)


@pytest.fixture
def gpus(monkeypatch):
    """Free, total and allocated GiB of each GPU."""
    gib_by_gpu: dict[int, tuple[int, int, int]] = {}
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: tuple(gib * GIB for gib in gib_by_gpu[device.index or 0][:2])
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gib_by_gpu[device.index or 0][2] * GIB)
    return gib_by_gpu


def size(network, **settings):
    return kv_cache_bytes(EngineSettings(model="m", **settings), network) / GIB


def test_a_size_in_the_settings_is_taken_as_it_is(gpus):
    gpus[0] = (80, 80, 0)
    for network in (Network(cpu=1), Network(cuda_0=1)):
        assert size(network, kv_cache_memory_bytes=3 * GIB, gpu_memory_utilization=0.5) == 3


def test_on_a_cpu_it_is_two_gib():
    assert size(Network(cpu=16), gpu_memory_utilization=0.1) == 2


def test_on_a_gpu_it_is_what_the_share_leaves_beside_the_weights(gpus):
    gpus[0] = (60, 80, 20)
    assert size(Network(cuda_0=20)) == pytest.approx(0.9 * 80 - 20)
    assert size(Network(cuda_0=20), gpu_memory_utilization=0.5) == pytest.approx(0.5 * 80 - 20)


def test_it_is_never_more_than_what_is_free_nor_less_than_nothing(gpus):
    gpus[0] = (10, 80, 20)
    assert size(Network(cuda_0=20)) == 10
    gpus[0] = (60, 80, 20)
    assert size(Network(cuda_0=20), gpu_memory_utilization=0.2) == 0


def test_of_several_gpus_the_one_with_the_least_memory_for_its_layers_limits_it(gpus):
    gpus[0], gpus[1] = (70, 80, 10), (50, 80, 30)
    # A quarter of the layers is on the first GPU, which has 62 GiB left; three quarters on the second with 42 GiB.
    assert size(Network(cuda_0=10, cuda_1=30)) == pytest.approx(42 / 0.75)
