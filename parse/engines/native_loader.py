"""Loads a model and its token-level methods into the native engine.

This module is above both the engine and the methods, so that neither has to import the other.
"""

import torch

from parse.config import EngineSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native.model import Model
from parse.engines.native.step_timing import planned_step_seconds
from parse.speculative.cost_model import StepCostModel
from parse.speculative.loading import load_methods


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
