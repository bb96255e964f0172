"""SPACE: the target foresees by itself, at masks behind the tokens that it checks in the same pass.

A group of masks hangs behind the last token of the text and behind every candidate that may turn out to be the last
accepted one; the group at that place holds the next candidates. The first of them is the token after the target's own
next one, which needs no guess. Nobody sees a mask but those behind it in its group.
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

from parse.speculative.proposal import MaskPrediction, Proposal, ProposalRequest, Proposer
from parse.speculative.proposers.eagle_head import ProposerLoadError, TargetModel
from parse.speculative.proposers.space_adapters import SpaceAdapters, load_adapters
from parse.tree import MASK

DEFAULT_NUM_MASKS = 5  # masks, where nobody says how many a model was tuned with; so many its authors took


@dataclass(frozen=True)
class MaskTokenEmbedder:
    """Of a model that was tuned as a whole: an ordinary token of its vocabulary."""

    embedding: Tensor

    @contextmanager
    def at(self, rows: Tensor) -> Iterator[None]:
        yield


class SpaceProposer(Proposer["SpaceState"]):
    """A target that reads masks, for any number of requests."""

    def __init__(self, mask_embedder: SpaceAdapters | MaskTokenEmbedder, num_masks: int) -> None:
        """With groups of `width` masks."""
        self.mask_embedder, self.num_masks = mask_embedder, num_masks

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel) -> Self:
        """With adapters, as `training.space` makes them."""
        adapters = load_adapters(path, network).attach(network)
        return cls(adapters, adapters.config.masks)

    @classmethod
    def from_tuned_model(
        cls, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_masks: int = DEFAULT_NUM_MASKS
    ) -> Self:
        """A network that was tuned to read the mask token of its tokenizer."""
        token, target = tokenizer.mask_token_id, TargetModel.of(network)
        if not isinstance(token, int):
            raise ProposerLoadError("space without adapters takes a tokenizer with a mask token, and this one has none")
        if token >= target.vocab_size:
            raise ProposerLoadError(
                f"the tokenizer's mask token is {token}, the target knows 0..{target.vocab_size - 1}"
            )
        return cls(MaskTokenEmbedder(target.embedding[token]), num_masks)

    def new_state(self) -> "SpaceState":
        return SpaceState()

    def propose(self, requests: Sequence[ProposalRequest["SpaceState"]]) -> list[Proposal]:
        return [self._propose_tree(wish) for wish in requests]

    def _propose_tree(self, request: ProposalRequest["SpaceState"]) -> Proposal:
        """The candidates, and groups where the text may well end after this pass, the likeliest places first."""
        prediction = request.state.prediction
        cumulative = list(accumulate(prediction.probabilities, mul))
        num_candidates = sum(
            1
            for chance in cumulative[: min(request.max_depth, request.max_tokens)]
            if chance >= request.min_probability
        )
        tokens, probabilities = list(prediction.token_ids[:num_candidates]), cumulative[:num_candidates]
        parents = list(range(-1, num_candidates - 1))
        # That the text ends behind a candidate: it comes, and the next one does not.
        ends_here = [come - more for come, more in zip((1.0, *probabilities), (*probabilities, 0.0), strict=True)]
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
    """Of one request: what the masks said last."""

    def __init__(self) -> None:
        self.prediction = NO_PREDICTION

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        self.prediction = mask_prediction or NO_PREDICTION
