"""From settings to the methods of one engine."""

from collections.abc import Sequence
from typing import Any

from parse.config import EngineSettings, SpeculativeConfig
from parse.engines.native.model import Model
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.policy import SpeculativeMethod
from parse.speculative.proposal import Proposer
from parse.speculative.proposers.draft_model import DraftModelProposer
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_head import ProposerLoadError
from parse.speculative.proposers.ngram import NgramProposer
from parse.speculative.proposers.parallelspec import ParallelSpecProposer
from parse.speculative.proposers.space import SpaceProposer
from parse.types import MethodName

DEFAULT_CHAIN_LENGTH = (
    12  # tokens of a chain whose method has no length of its own; what does not pay of it is left out
)
DEFAULT_TREE_DEPTH = 8


def load_methods(
    settings: EngineSettings, model: Model, cost_model: StepCostModel
) -> dict[MethodName, SpeculativeMethod]:
    """Loaded, in the order of the settings; what they need of the model is asked of it."""
    methods: dict[MethodName, SpeculativeMethod] = {}
    for config in settings.speculative_configs:
        try:
            proposer, max_tokens = _load_proposer(config, settings, model)
        except ProposerLoadError as error:
            raise ProposerLoadError(f"speculation by {config.method}, head {config.model}: {error}") from error
        guard, steps = GuardedProposer(proposer, model.vocab_size), config.method in ("eagle3", "draft_model")
        methods[config.method] = SpeculativeMethod(config.method, guard, max_tokens, steps, (), cost_model)
    model.aux_hidden_state_layers = tuple(
        sorted({tap for way in methods.values() for tap in way.proposer.aux_hidden_state_layers})
    )
    for way in methods.values():
        way.aux_hidden_state_layers = model.aux_hidden_state_layers
    return methods


def bytes_per_token(methods: Sequence[SpeculativeMethod], model: Model) -> int:
    """Beside keys and values of the model: the features of a token, and what methods keep of it."""
    width = model.network.config.get_text_config().hidden_size
    hidden_state_bytes = len(model.aux_hidden_state_layers) * width * model.network.dtype.itemsize
    return hidden_state_bytes + sum(way.proposer.bytes_per_token for way in methods)


def _load_proposer(config: SpeculativeConfig, settings: EngineSettings, model: Model) -> tuple[Proposer[Any], int]:
    """The method, and how many tokens it proposes at most."""
    head, beam = config.model or "", config.topk
    match config.method:
        case "ngram":
            return NgramProposer(), config.num_speculative_tokens or DEFAULT_CHAIN_LENGTH
        case "draft_model":
            small = DraftModelProposer.load(head, model, device=settings.device, dtype=settings.dtype)
            return small, config.num_speculative_tokens or DEFAULT_CHAIN_LENGTH
        case "eagle3":
            most = config.num_speculative_tokens or (2 * DEFAULT_TREE_DEPTH if beam > 1 else DEFAULT_CHAIN_LENGTH)
            return Eagle3Proposer.load(
                head, model.network, depth=min(most, DEFAULT_TREE_DEPTH if beam > 1 else most) - 1, beam=beam
            ), most
        case "parallel":
            parallel = ParallelSpecProposer.load(head, model.network, beam=beam)
            ahead = parallel.head.config.parallel_tokens
            return parallel, config.num_speculative_tokens or (2 * ahead if beam > 1 else ahead)
        case "space":
            space = (
                SpaceProposer.load(head, model.network)
                if head
                else SpaceProposer.from_tuned_model(model.network, model.tokenizer)
            )
            space.num_masks = (
                min(space.num_masks, config.num_speculative_tokens or space.num_masks)
                if head
                else config.num_speculative_tokens or space.num_masks
            )
            model.mask_embedder = space.mask_embedder
            return space, space.num_masks * (space.num_masks + 2)  # a group behind every candidate, and behind the text
