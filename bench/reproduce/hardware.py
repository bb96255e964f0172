"""The hardware that PARSE and its baselines use: GPUs, or CPU cores on a machine without GPUs."""

import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parse.config import EngineSettings
from parse.engine_config import PARALLEL_SIZES, VLLMEngineConfig
from parse.engines.vllm.installation import GPU_DEVICES

NVIDIA_SMI_FIELDS = "name,memory.total,driver_version"


@dataclass(frozen=True)
class Machine:
    """What a server can be given."""

    unit: Literal["GPU", "core"]
    num_cores: int
    gpus: tuple[str, ...] = ()
    """A description of each GPU, if the driver's tool can be called."""


@dataclass(frozen=True)
class Allocation:
    """The number of GPUs or cores of the target, and of the target and the draft model together."""

    target: int
    total: int


class UnsupportedConfig(ValueError):
    """The configuration cannot be compared with vLLM alone. The message says what is supported."""


def this_machine() -> Machine:
    has_gpus = any(Path(device).exists() for device in GPU_DEVICES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine("GPU" if has_gpus else "core", cores, _gpu_names() if has_gpus else ())


def _gpu_names() -> tuple[str, ...]:
    command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(done.stdout.strip().splitlines())


def allocate(
    machine: Machine, models: Mapping[str, EngineSettings], deployments: Mapping[str, Mapping[str, Any]]
) -> Allocation:
    """Returns the hardware of the replicas of `Verifier` and `Drafter`.

    Models that share a GPU, with fractions in `num_gpus`, use a whole number of GPUs together.
    """
    amounts = {name: _amount(machine, name, settings, deployments.get(name, {})) for name, settings in models.items()}
    target = math.ceil(amounts["Verifier"])
    total = math.ceil(sum(amounts.values()))
    if machine.unit == "core":  # threads beyond the cores of the machine add nothing
        target, total = min(target, machine.num_cores), min(total, machine.num_cores)
    return Allocation(target, total)


def _amount(machine: Machine, name: str, settings: EngineSettings, deployment: Mapping[str, Any]) -> float:
    replicas = num_replicas(name, deployment)
    engine = settings.engine
    if machine.unit == "core":
        if isinstance(engine, VLLMEngineConfig):
            return replicas * int(engine.environment.get("OMP_NUM_THREADS", machine.num_cores))
        return replicas * (settings.num_threads or machine.num_cores)
    options = deployment.get("ray_actor_options") or {}
    if isinstance(engine, VLLMEngineConfig):
        return replicas * engine.num_gpus
    return replicas * float(options.get("num_gpus", 0 if settings.device == "cpu" else 1))


def num_replicas(name: str, deployment: Mapping[str, Any]) -> int:
    replicas = deployment.get("num_replicas") or 1
    if deployment.get("autoscaling_config") or not isinstance(replicas, int):
        raise UnsupportedConfig(f"{name}: the hardware must not change during a measurement, so set num_replicas")
    return replicas


def parallel_sizes(engine_args: Mapping[str, Any], replicas: int) -> dict[str, int]:
    """Returns the arguments with which one server uses the GPUs of all replicas of the target."""
    if replicas == 1:
        return {}
    return {"data_parallel_size": replicas * int(engine_args.get("data_parallel_size") or 1)}


def enlarged_parallel_sizes(
    engine_args: Mapping[str, Any], num_gpus: int, num_heads: int | None
) -> dict[str, int] | None:
    """Returns the arguments with which one server uses exactly this number of GPUs, or None if there are none.

    A larger tensor parallel size is preferred, because it also makes a single answer faster. It has to divide the
    number of attention heads. Otherwise, copies of the model share the GPUs, with the largest tensor parallel size for
    which the number of GPUs is a multiple.
    """
    sizes = {name: int(engine_args.get(name) or 1) for name in PARALLEL_SIZES}
    tensor_size = sizes.pop("tensor_parallel_size")
    others = math.prod(sizes.values())
    enlarged, remainder = divmod(num_gpus, others)
    if not remainder and enlarged >= tensor_size and (num_heads is None or num_heads % enlarged == 0):
        return {"tensor_parallel_size": enlarged}
    others //= sizes["data_parallel_size"]
    for size in range(tensor_size, 0, -1):
        if num_gpus % (others * size) == 0 and (num_heads is None or num_heads % size == 0):
            return {"tensor_parallel_size": size, "data_parallel_size": num_gpus // (others * size)}
    return None
