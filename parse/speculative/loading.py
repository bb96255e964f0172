"""Loads the token-level methods that an engine's settings name."""

from parse.config import EngineSettings
from parse.engines.native.model import Model
from parse.registry import METHODS, resolve
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.speculative.proposers.base import LoadContext, LoadedProposer, ProposerLoadError


def load_methods(settings: EngineSettings, model: Model, cost_model: StepCostModel) -> dict[str, SpeculativeMethod]:
    """Loads the methods of the settings, in their order.

    It also sets which hidden states the target returns, and which embedding it reads at masks.
    """
    load_context = LoadContext(model.network, model.tokenizer, settings.device, settings.dtype)
    loaded: dict[str, LoadedProposer] = {}
    for config in settings.speculative_configs:
        try:
            loaded[config.method] = resolve(METHODS[config.method].loader)(config, load_context)
        except ProposerLoadError as error:
            raise ProposerLoadError(f"speculative method {config.method}, model {config.model}: {error}") from error
    layers = {layer for method in loaded.values() for layer in method.proposer.aux_hidden_state_layers}
    model.aux_hidden_state_layers = tuple(sorted(layers))
    for method in loaded.values():
        if method.mask_embedder is not None:
            model.mask_embedder = method.mask_embedder
    return {
        name: SpeculativeMethod(
            name=name,
            proposer=GuardedProposer(method.proposer, model.vocab_size),
            max_tokens=method.max_tokens,
            is_sequential=METHODS[name].is_sequential,
            aux_hidden_state_layers=model.aux_hidden_state_layers,
            cost_model=cost_model,
            min_confidence=settings.drafting.min_confidence if index == 0 else None,
        )
        for index, (name, method) in enumerate(loaded.items())
    }
