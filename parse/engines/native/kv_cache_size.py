"""How much memory an engine may use for its KV cache."""

import math
from collections import Counter

import torch
from torch import nn

from parse.config import EngineSettings

CPU_KV_CACHE_BYTES = 2 * 2**30


def kv_cache_bytes(settings: EngineSettings, network: nn.Module) -> int:
    """Returns the size of the KV cache in bytes.

    This is the size in the settings, or else what the devices of the model can hold.

    On a GPU, this process may use the share `gpu_memory_utilization` of the memory, for the cache and for everything
    that it has already allocated. The cache never takes more than is free, because another process may use the same
    GPU. If a model is spread over several GPUs, the keys and values of a layer are where its weights are. The GPU with
    the least free memory relative to its share of the weights then limits the size of the whole cache.
    """
    if settings.kv_cache_memory_bytes is not None:
        return settings.kv_cache_memory_bytes
    weight_bytes: Counter[torch.device] = Counter()
    for parameter in network.parameters():
        weight_bytes[parameter.device] += parameter.nbytes
    total_bytes = sum(weight_bytes.values())
    sizes = [
        _free_gpu_bytes(device, settings.gpu_memory_utilization) * total_bytes / weights
        for device, weights in weight_bytes.items()
        if device.type == "cuda" and weights
    ]
    return max(0, math.floor(min(sizes))) if sizes else CPU_KV_CACHE_BYTES


def _free_gpu_bytes(device: torch.device, utilization: float) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return min(free, total * utilization - torch.cuda.max_memory_allocated(device))
