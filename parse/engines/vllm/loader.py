"""Starts vLLM with the settings of a model, and connects to it."""

import os
from functools import partial

from parse.config import EngineSettings
from parse.engine_config import VLLMEngineConfig
from parse.engines.remote.loader import connect
from parse.engines.remote.server import ServerAddress
from parse.engines.remote.vllm import VLLM
from parse.engines.vllm.command import check_arguments, server_command, server_environment
from parse.engines.vllm.engine import VLLMEngine
from parse.engines.vllm.installation import VLLMUnavailable, find_python
from parse.engines.vllm.server_process import SupervisedServer

CONNECT_TIMEOUT_S = 5.0


def check_vllm(settings: EngineSettings, config: VLLMEngineConfig, *, on_this_node: bool) -> None:
    """Raises ValueError if vLLM is missing or rejects its arguments.

    If the server may run on another node, it can have an environment there that this node lacks.
    """
    try:
        python = find_python(config.executable)
    except VLLMUnavailable as error:
        if not on_this_node:
            return
        raise ValueError(str(error)) from error
    check_arguments(python, settings, config, on_this_node=on_this_node)


def load_vllm_engine(settings: EngineSettings, config: VLLMEngineConfig) -> VLLMEngine:
    """Raises ValueError if vLLM cannot be started. The message quotes its log."""
    try:
        python = find_python(config.executable)
    except VLLMUnavailable as error:
        raise ValueError(str(error)) from error
    num_assigned = len([gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
    if 0 < num_assigned < config.num_gpus:
        raise ValueError(
            f"engine.engine_args need {config.num_gpus} GPUs, and {num_assigned} are assigned to the replica: set "
            "num_gpus in its ray_actor_options, or leave it out"
        )
    server = SupervisedServer(
        partial(server_command, python, settings, config),
        server_environment(python, config),
        start_timeout_s=config.start_timeout_s,
        stall_timeout_s=config.stall_timeout_s,
    )
    address = ServerAddress(
        "http://vllm",
        connect_timeout_s=CONNECT_TIMEOUT_S,
        stall_timeout_s=config.stall_timeout_s,
        socket_path=str(server.socket_path),
    )
    try:
        connection = connect(
            settings, [address], model_name=None, dialect=VLLM(), retry_timeout_s=config.retry_timeout_s
        )
    except BaseException:
        server.close()
        raise
    return VLLMEngine(connection, server)
