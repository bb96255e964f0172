"""The command that starts vLLM with the arguments of an operator, and a check of these arguments before."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from parse.config import EngineSettings
from parse.engine_config import VLLMEngineConfig

ARGUMENT_CHECK = Path(__file__).with_name("argument_check.py")
CHECK_TIMEOUT_S = 300.0
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""The command `vllm serve` does not run if the package has another name, as the build for CPUs has."""


class BadArguments(ValueError):
    """vLLM rejects its arguments. The message has its own words."""


def server_command(python: Path, settings: EngineSettings, config: VLLMEngineConfig, socket_path: Path) -> list[str]:
    return [str(python), "-m", SERVER_MODULE, *server_arguments(settings, config, socket_path)]


def server_arguments(settings: EngineSettings, config: VLLMEngineConfig, socket_path: Path) -> list[str]:
    return [
        *("--model", settings.model, "--served-model-name", Path(settings.model).name),
        *("--uds", str(socket_path), "--max-model-len", str(_max_model_len(settings))),
        *command_line(config.engine_args),
    ]


def server_environment(python: Path, config: VLLMEngineConfig) -> dict[str, str]:
    # A key would be required of this process too. It is not needed, because nobody else can open the socket.
    excluded = "PYTHONPATH", "VLLM_API_KEY"
    environment = {name: value for name, value in os.environ.items() if name not in excluded}
    if python == Path(sys.executable):  # the packages of the replica may come from there
        environment |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    # Whoever starts vLLM directly can read that it sends usage statistics. Here nobody would expect it.
    if config.reserves_gpus:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # it hides all GPUs from a replica without any
    return environment | {"VLLM_NO_USAGE_STATS": "1"} | config.environment


def command_line(engine_args: Mapping[str, Any]) -> list[str]:
    """Returns arguments in the form that the command `vllm serve` reads.

    A number of values is written after its name, and a mapping is written as JSON. Null leaves the argument out.
    """
    words: list[str] = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(_word, value)]
        elif value is not None:
            words += [f"--{flag}", _word(value)]
    return words


def check_arguments(python: Path, settings: EngineSettings, config: VLLMEngineConfig, *, on_this_node: bool) -> None:
    """Raises BadArguments if vLLM rejects them.

    Some can be judged only where the server will run. The others are checked anywhere.
    """
    arguments = server_arguments(settings, config, Path("vllm.sock"))
    done = subprocess.run(
        [str(python), str(ARGUMENT_CHECK), "all" if on_this_node else "syntax", *arguments],
        env=server_environment(python, config),
        capture_output=True,
        text=True,
        timeout=CHECK_TIMEOUT_S,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BadArguments(f"vLLM rejects engine.engine_args: {lines[-1].strip()}")


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _max_model_len(settings: EngineSettings) -> int:
    """Returns the limit of the settings, or that of the model if it is lower."""
    own_limit = getattr(AutoConfig.from_pretrained(settings.model).get_text_config(), "max_position_embeddings", None)
    return min(settings.max_model_len, own_limit or settings.max_model_len)
