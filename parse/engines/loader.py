"""Starts the engine that the settings of a model name."""

from parse.config import EngineSettings
from parse.engine_config import RemoteEngineConfig, VLLMEngineConfig
from parse.engines.protocol import Engine
from parse.engines.remote.loader import load_remote_engine
from parse.engines.remote.transport import FindDeployment
from parse.engines.vllm.loader import load_vllm_engine


def load_engine(settings: EngineSettings, find_deployment: FindDeployment | None = None) -> Engine:
    """Starts the engine of the settings. Only an engine with `deployment` needs `find_deployment`."""
    if isinstance(settings.engine, RemoteEngineConfig):
        return load_remote_engine(settings, settings.engine, find_deployment)
    if isinstance(settings.engine, VLLMEngineConfig):
        return load_vllm_engine(settings, settings.engine)
    # A process without a native engine, such as a router, is spared the seconds and the memory of this import.
    from parse.engines.native_loader import load_native_engine

    return load_native_engine(settings)
