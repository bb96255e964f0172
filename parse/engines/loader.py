"""Assembles an engine from its settings."""

import torch

from parse.config import EngineSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native.model import Model
from parse.speculative.cost_model import StepCostModel
from parse.speculative.loading import load_methods


def load_native_engine(settings: EngineSettings) -> NativeEngine:
    """Loads the model and the token-level methods that the settings name."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    model = Model.load(
        settings.model, device=settings.device, dtype=settings.dtype, int8=settings.quantization == "int8"
    )
    cost_model = StepCostModel()
    methods = load_methods(settings, model, cost_model)
    return NativeEngine(settings, model, methods={str(k): v for k, v in methods.items()}, cost_model=cost_model)
