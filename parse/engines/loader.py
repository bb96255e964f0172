"""Starts the engine that the settings of a model name.

The native engine gets its model and its token-level methods here.

This module is above both the engine and the methods, so that neither has to import the other.
"""

import torch

from parse.config import EngineSettings
from parse.engine_config import RemoteEngineConfig, VLLMEngineConfig
from parse.engines.native.engine import NativeEngine
from parse.engines.native.model import Model
from parse.engines.native.step_timing import planned_step_seconds
from parse.engines.protocol import Engine
from parse.engines.remote.loader import load_remote_engine
from parse.engines.remote.transport import FindDeployment
from parse.engines.vllm.loader import load_vllm_engine
from parse.speculative.cost_model import StepCostModel
from parse.speculative.loading import load_methods


def load_engine(settings: EngineSettings, find_deployment: FindDeployment | None = None) -> Engine:
    """Starts the engine of the settings. Only an engine with `deployment` needs `find_deployment`."""
    if isinstance(settings.engine, RemoteEngineConfig):
        return load_remote_engine(settings, settings.engine, find_deployment)
    if isinstance(settings.engine, VLLMEngineConfig):
        return load_vllm_engine(settings, settings.engine)
    return load_native_engine(settings)


def load_native_engine(settings: EngineSettings) -> NativeEngine:
    """Loads the model and the methods of the settings, and starts an engine."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    model = Model.load(
        settings.model, device=settings.device, dtype=settings.dtype, int8=settings.quantization == "int8"
    )
    cost_model = StepCostModel()
    methods = load_methods(settings, model, cost_model)
    step_seconds = planned_step_seconds(model)
    cost_model.initialize(step_seconds)
    return NativeEngine(settings, model, methods=methods, cost_model=cost_model, step_seconds=step_seconds)
