"""From settings to the methods of one engine."""

from collections.abc import Sequence
from typing import Any

from parse.config import EngineSettings, SpeculationSettings
from parse.engines.native.model import Model
from parse.speculative.cost_model import Costs
from parse.speculative.guard import Guard
from parse.speculative.policy import Way
from parse.speculative.proposal import Foresight
from parse.speculative.proposers.draft_model import DraftModel
from parse.speculative.proposers.eagle3 import Eagle3
from parse.speculative.proposers.eagle_head import HeadError
from parse.speculative.proposers.ngram import Ngram
from parse.speculative.proposers.parallelspec import Parallel
from parse.speculative.proposers.space import Space
from parse.types import Method

CHAIN = 12  # tokens of a chain whose method has no length of its own; what does not pay of it is left out
TREE_DEPTH = 8


def ways(settings: EngineSettings, model: Model, costs: Costs) -> dict[Method, Way]:
    """Loaded, in the order of the settings; what they need of the model is asked of it."""
    found: dict[Method, Way] = {}
    for given in settings.speculation:
        try:
            foresight, most = _loaded(given, settings, model)
        except HeadError as error:
            raise HeadError(f"speculation by {given.method}, head {given.head}: {error}") from error
        guard, steps = Guard(foresight, model.vocabulary), given.method in ("eagle3", "draft_model")
        found[given.method] = Way(given.method, guard, most, steps, (), costs)
    model.taps = tuple(sorted({tap for way in found.values() for tap in way.foresight.taps}))
    for way in found.values():
        way.taps = model.taps
    return found


def bytes_per_token(ways: Sequence[Way], model: Model) -> int:
    """Beside keys and values of the model: the features of a token, and what methods keep of it."""
    width = model.network.config.get_text_config().hidden_size
    features = len(model.taps) * width * model.network.dtype.itemsize
    return features + sum(way.foresight.bytes_per_token for way in ways)


def _loaded(given: SpeculationSettings, settings: EngineSettings, model: Model) -> tuple[Foresight[Any], int]:
    """The method, and how many tokens it proposes at most."""
    head, beam = given.head or "", given.beam
    match given.method:
        case "ngram":
            return Ngram(), given.tokens or CHAIN
        case "draft_model":
            small = DraftModel.load(head, model, device=settings.device, dtype=settings.dtype)
            return small, given.tokens or CHAIN
        case "eagle3":
            most = given.tokens or (2 * TREE_DEPTH if beam > 1 else CHAIN)
            return Eagle3.load(
                head, model.network, depth=min(most, TREE_DEPTH if beam > 1 else most) - 1, beam=beam
            ), most
        case "parallel":
            parallel = Parallel.load(head, model.network, beam=beam)
            ahead = parallel.head.config.parallel_tokens
            return parallel, given.tokens or (2 * ahead if beam > 1 else ahead)
        case "space":
            space = Space.load(head, model.network) if head else Space.tuned(model.network, model.tokenizer)
            space.width = min(space.width, given.tokens or space.width) if head else given.tokens or space.width
            model.masks = space.masks
            return space, space.width * (space.width + 2)  # a group behind every candidate, and behind the text
