"""Reads a Hugging Face checkpoint. If it cannot be loaded, the error gives the reason in one line."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from parse.device_errors import is_out_of_memory
from parse.errors import RequestError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class CheckpointError(ValueError):
    """Raised for a path or hub id from which no causal language model can be loaded."""


def load_checkpoint(path: str | Path, device: str, dtype: Dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the network, onto a device or spread over all GPUs, and the tokenizer.

    `device` comes from `resolve_device`, or is "meta", which reads no weights. The dtype "auto" means float32 on a CPU
    and the dtype of the checkpoint elsewhere.
    """
    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a directory")
    precision = "float32" if dtype == "auto" and device == "cpu" else dtype
    config: PretrainedConfig | None = None
    try:
        config = AutoConfig.from_pretrained(path)
        if device != "meta":
            _check_memory(path, config, device, precision)
        tokenizer = _load_tokenizer(path)
        load: Any = AutoModelForCausalLM.from_pretrained
        network, loading_info = load(
            path,
            dtype=precision,
            device_map=None if device == "cpu" else device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    except ImportError as error:
        raise CheckpointError(f"{path} needs a package that is not installed: {_one_line(error)}") from error
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, CheckpointError):
            raise
        if config is not None and is_out_of_memory(error):
            raise _out_of_memory(path, config, device, precision) from error
        raise CheckpointError(
            f"{path} is not a causal language model that can be loaded: {_one_line(error)}"
        ) from error
    for name, shape, expected_shape in loading_info["mismatched_keys"]:
        raise CheckpointError(
            f"{path}: the weight {name} has the shape {tuple(shape)}, and its config says {tuple(expected_shape)}"
        )
    if missing := sorted(loading_info["missing_keys"]):  # the library has filled them with random numbers
        raise CheckpointError(f"{path} lacks {len(missing)} weights of its model; the first one is {missing[0]}")
    placed = {str(place) for place in getattr(network, "hf_device_map", {}).values()}
    if device != "cpu" and (offloaded := placed & {"cpu", "disk"}):
        message = (
            f"the GPUs are too small for it, and some layers would be on the {' and the '.join(sorted(offloaded))}"
        )
        raise CheckpointError(f"{_out_of_memory(path, config, device, precision)}; {message}")
    return network, tokenizer


def load_skeleton(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the network without its weights, and the tokenizer.

    It reads the config, the tokenizer and the headers of the weights, and raises CheckpointError for what is missing or
    damaged there.
    """
    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a directory")
    if Path(path).is_dir():
        for file in _weight_files(Path(path)):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is damaged or incomplete: {_one_line(error)}") from error
        if not _is_quantized(path):
            return load_checkpoint(path, "meta", "auto")
    # The weights of a hub id may not be on this machine. Quantized ones can only be read where their package runs.
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        return network, _load_tokenizer(path)
    except (OSError, ValueError, RuntimeError, NotImplementedError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{path} is not a causal language model that can be loaded: {_one_line(error)}"
        ) from error


def _load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (ImportError, OSError):
        raise
    except Exception as error:  # damaged files raise many kinds of errors in the library
        message = f"{path}: its tokenizer cannot be read: {type(error).__name__}: {_one_line(error)}"
        raise CheckpointError(message) from error
    return tokenizer


def resolve_device(device: str) -> str:
    gpus = torch.cuda.device_count()
    available = ["cpu", *(["cuda", "balanced"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device not in available:
        raise RequestError("device", f"must be auto or one of {', '.join(available)}, got {device!r}")
    return device


def weight_bytes(config: PretrainedConfig, dtype: Dtype) -> int | None:
    """Returns the size of the weights, or None if it is not known without loading them."""
    if getattr(config, "quantization_config", None):
        return None
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except (RuntimeError, NotImplementedError):  # an operation that has no shapes without values
        return None
    if dtype == "auto" and getattr(config, "dtype", None) is None:
        return None  # that of the weights
    precision: torch.dtype = (
        getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    ) or torch.float32
    return sum(parameter.numel() for parameter in network.parameters()) * precision.itemsize


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads from a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [file for file in (folder / "model.safetensors",) if file.is_file()]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {_one_line(error)}") from error
    return [folder / name for name in names]


def _is_quantized(path: str | Path) -> bool:
    try:
        return bool(json.loads((Path(path) / "config.json").read_text()).get("quantization_config"))
    except (OSError, ValueError, AttributeError):  # loading says what is wrong with it
        return False


def free_bytes(device: str) -> int | None:
    """Returns the free memory of a device, or of all GPUs. Returns None if the system does not report it."""
    if device == "balanced":
        return sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    free = _memory_info("MemAvailable", "SwapFree")
    limits = [size for size in (free, _container_free_bytes()) if size is not None]
    return min(limits, default=None)


def machine_bytes() -> int | None:
    """Returns the memory of this machine or container. Returns None if the system does not report it."""
    limits = [size for size in (_memory_info("MemTotal", "SwapTotal"), _container_bytes("memory.max")) if size]
    return min(limits, default=None)


def _memory_info(*names: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
    return sum(sizes.get(name, 0) for name in names) or None


def _container_free_bytes() -> int | None:
    """Returns what a container may still use, or None without a limit."""
    limit, used = _container_bytes("memory.max"), _container_bytes("memory.current")
    return None if limit is None or used is None else limit - used


def _container_bytes(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _check_memory(path: str | Path, config: PretrainedConfig, device: str, dtype: Dtype) -> None:
    """Raises if the weights cannot fit.

    Without this check, the operating system would end the process without a message.
    """
    needed, free = weight_bytes(config, dtype), free_bytes(device)
    if needed is not None and free is not None and needed > free:
        raise _out_of_memory(path, config, device, dtype)


def _out_of_memory(path: str | Path, config: PretrainedConfig, device: str, dtype: Dtype) -> CheckpointError:
    needed, free = (readable_bytes(size) for size in (weight_bytes(config, dtype), free_bytes(device)))
    place = {"cpu": "this machine", "balanced": "all GPUs together"}.get(device, device)
    return CheckpointError(f"{path}: out of memory: its weights need {needed}, and {free} is free on {place}")


def readable_bytes(size: int | None) -> str:
    if size is None:
        return "an unknown amount"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
