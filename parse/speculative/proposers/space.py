"""SPACE: the target proposes its own next tokens, at masks.

It computes the masks in the same pass as the tokens that it verifies.

A group of masks follows each place where acceptance is likely to end: the last token of the sequence, or a candidate.
The masks after the last accepted candidate predict the next candidates. The target itself gives the next token, so the
first mask predicts the token after that one. A mask is visible only to the later masks of its group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.config import SpeculativeConfig
from parse.speculative.proposal import MaskPrediction, Proposal, ProposalRequest, Proposer
from parse.speculative.proposers.base import LoadContext, LoadedProposer, ProposerLoadError
from parse.speculative.proposers.eagle_head import TargetModel
from parse.speculative.proposers.space_adapters import SpaceAdapters, load_adapters
from parse.tree import MASK

DEFAULT_NUM_MASKS = 5  # as in the SPACE paper, for a tuned model that does not say how many masks it was tuned with


def load(config: SpeculativeConfig, load_context: LoadContext) -> LoadedProposer:
    """Loads the adapters of the settings.

    Without a model, it uses the mask token that the target itself was tuned to read.
    """
    network = load_context.network
    if config.model:
        proposer = SpaceProposer.load(config.model, network)
        if config.num_speculative_tokens:  # adapters predict no further than they were trained for
            proposer.num_masks = min(proposer.num_masks, config.num_speculative_tokens)
    else:
        proposer = SpaceProposer.from_tuned_model(
            network, load_context.tokenizer, config.num_speculative_tokens or DEFAULT_NUM_MASKS
        )
    # There are at most `num_masks` candidates, and a group of masks after each of them and after the sequence.
    max_tokens = proposer.num_masks + (proposer.num_masks + 1) * proposer.num_masks
    return LoadedProposer(proposer, max_tokens, proposer.mask_embedder)


@dataclass(frozen=True)
class MaskTokenEmbedder:
    """Embeds masks as an ordinary token of the vocabulary.

    It is for a model that was tuned as a whole.
    """

    embedding: Tensor

    @contextmanager
    def at(self, indices: Tensor) -> Iterator[None]:
        yield


class SpaceProposer(Proposer["SpaceState"]):
    """Proposes the target's own predictions, and masks for the next ones.

    It serves any number of requests.
    """

    def __init__(self, mask_embedder: SpaceAdapters | MaskTokenEmbedder, num_masks: int) -> None:
        """Proposes groups of `num_masks` masks."""
        self.mask_embedder, self.num_masks = mask_embedder, num_masks

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel) -> Self:
        """Loads adapters that `training.space` trained, and attaches them to the network."""
        adapters = load_adapters(path, network).attach(network)
        return cls(adapters, adapters.config.masks)

    @classmethod
    def from_tuned_model(
        cls, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_masks: int = DEFAULT_NUM_MASKS
    ) -> Self:
        """Returns a proposer for a network that reads its tokenizer's mask token.

        The network must have been tuned for that.
        """
        token, target = tokenizer.mask_token_id, TargetModel.of(network)
        if not isinstance(token, int):
            raise ProposerLoadError(
                "without adapters, space needs a tokenizer with a mask token, and this tokenizer has none"
            )
        if token >= target.vocab_size:
            raise ProposerLoadError(
                f"the tokenizer's mask token must lie in 0..{target.vocab_size - 1} for this target, got {token}"
            )
        return cls(MaskTokenEmbedder(target.embedding[token]), num_masks)

    def new_state(self) -> "SpaceState":
        return SpaceState()

    def propose(self, requests: Sequence[ProposalRequest["SpaceState"]]) -> list[Proposal]:
        return [self._propose_tree(request) for request in requests]

    def _propose_tree(self, request: ProposalRequest["SpaceState"]) -> Proposal:
        """Returns the candidates, with groups of masks after some of them.

        The masks are at the places where acceptance most likely ends.
        """
        prediction = request.state.prediction
        cumulative = list(accumulate(prediction.probabilities, mul))
        num_candidates = sum(
            1
            for probability in cumulative[: min(request.max_depth, request.max_tokens)]
            if probability >= request.min_probability
        )
        tokens, probabilities = list(prediction.token_ids[:num_candidates]), cumulative[:num_candidates]
        parents = list(range(-1, num_candidates - 1))
        # Acceptance ends after a candidate if this candidate is accepted and the next one is not.
        ends_here = [
            accepted - next_accepted
            for accepted, next_accepted in zip((1.0, *probabilities), (*probabilities, 0.0), strict=True)
        ]
        for place in sorted(range(num_candidates + 1), key=lambda place: -ends_here[place]):
            width = min(self.num_masks, request.max_tokens - len(tokens))
            if width < 1 or (ends_here[place] < request.min_probability and len(tokens) > num_candidates):
                break
            parents += [place - 1, *range(len(tokens), len(tokens) + width - 1)]
            tokens += [MASK] * width
            probabilities += [ends_here[place]] * width
        return Proposal(tokens, parents, probabilities)


NO_PREDICTION = MaskPrediction((), ())


class SpaceState:
    """The latest predictions at the masks of one sequence."""

    def __init__(self) -> None:
        self.prediction = NO_PREDICTION

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        self.prediction = mask_prediction or NO_PREDICTION
