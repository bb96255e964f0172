"""The command that starts vLLM with the arguments of an operator, and a check of these arguments before."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from parse.config import EngineSettings
from parse.engine_config import VLLMEngineConfig

logger = logging.getLogger(__name__)

ARGUMENT_CHECK = Path(__file__).with_name("argument_check.py")
CHECK_TIMEOUT_S = 300.0
EXIT_BAD_ARGUMENTS = 2  # of argparse, and of the program that checks the arguments
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""It is deprecated since vLLM 0.32, but the command `vllm serve` does not run if the package has another name, as the
build for CPUs has."""


class BadArguments(ValueError):
    """vLLM rejects its arguments. The message is that of vLLM."""


def server_command(python: Path, settings: EngineSettings, config: VLLMEngineConfig, socket_path: Path) -> list[str]:
    return [str(python), "-m", SERVER_MODULE, *server_arguments(settings, config, socket_path)]


def server_arguments(settings: EngineSettings, config: VLLMEngineConfig, socket_path: Path) -> list[str]:
    return ["--uds", str(socket_path), *model_arguments(settings, config)]


def model_arguments(settings: EngineSettings, config: VLLMEngineConfig) -> list[str]:
    """Returns all arguments except the address."""
    return [
        *("--model", settings.model, "--served-model-name", Path(settings.model).name),
        *("--max-model-len", str(_max_model_len(settings, config))),
        *command_line(config.engine_args),
    ]


def server_environment(python: Path, config: VLLMEngineConfig) -> dict[str, str]:
    # A key would be required of this process too. It is not needed, because nobody else can open the socket.
    excluded = "PYTHONPATH", "VLLM_API_KEY"
    environment = {name: value for name, value in os.environ.items() if name not in excluded}
    if python == Path(sys.executable):  # the packages of the replica may come from there
        environment |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    if config.reserves_gpus:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # it hides all GPUs from a replica without any
    # vLLM sends usage statistics by default. An operator of this service would not expect that.
    return environment | {"VLLM_NO_USAGE_STATS": "1"} | config.environment


def command_line(engine_args: Mapping[str, Any]) -> list[str]:
    """Returns arguments in the form that the command `vllm serve` reads.

    A list becomes several values after one name, and a mapping becomes JSON. Null leaves the argument out.
    """
    arguments: list[str] = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{flag}", *map(_argument, value)]
        elif value is not None:
            arguments += [f"--{flag}", _argument(value)]
    return arguments


def check_arguments(python: Path, settings: EngineSettings, config: VLLMEngineConfig, *, on_this_node: bool) -> None:
    """Raises BadArguments if vLLM rejects them.

    With `on_this_node`, the model and the hardware are taken into account. Otherwise only the names and types of the
    arguments are checked, and a check that is not possible here is skipped.
    """
    arguments = server_arguments(settings, config, Path("vllm.sock"))
    check = subprocess.run(
        [str(python), str(ARGUMENT_CHECK), "all" if on_this_node else "syntax", *arguments],
        env=server_environment(python, config),
        capture_output=True,
        text=True,
        timeout=CHECK_TIMEOUT_S,
    )
    lines = check.stderr.strip().splitlines() or [f"exit code {check.returncode}"]
    if check.returncode == EXIT_BAD_ARGUMENTS:
        raise BadArguments(f"vLLM rejects engine.engine_args: {lines[-1].strip()}")
    if check.returncode and on_this_node:
        raise BadArguments(f"vLLM does not work in the environment of {python}: {lines[-1].strip()}")
    if check.returncode:
        logger.warning("the arguments of vLLM cannot be checked on this node: %s", lines[-1].strip())


def _argument(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _max_model_len(settings: EngineSettings, config: VLLMEngineConfig) -> int:
    """Returns the limit of the settings, or that of the model if it is lower."""
    if "hf_overrides" in config.engine_args:  # it may extend the context
        return settings.max_model_len
    try:
        model_config = AutoConfig.from_pretrained(settings.model)
    except (ValueError, OSError):  # vLLM may support models that this version of transformers does not
        return settings.max_model_len
    own_limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return min(settings.max_model_len, own_limit or settings.max_model_len)
