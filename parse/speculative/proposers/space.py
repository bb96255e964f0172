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

from parse.speculative.proposal import Foreseen, Foresight, Proposal, Wish
from parse.speculative.proposers.eagle_head import HeadError, Target
from parse.speculative.proposers.space_adapters import Adapters, load_adapters
from parse.tree import MASK

UNTOLD = 5  # masks, where nobody says how many a model was tuned with; so many its authors took


@dataclass(frozen=True)
class MaskToken:
    """Of a model that was tuned as a whole: an ordinary token of its vocabulary."""

    embedding: Tensor

    @contextmanager
    def at(self, rows: Tensor) -> Iterator[None]:
        yield


class Space(Foresight["Candidates"]):
    """A target that reads masks, for any number of requests."""

    def __init__(self, masks: Adapters | MaskToken, width: int) -> None:
        """With groups of `width` masks."""
        self.masks, self.width = masks, width

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel) -> Self:
        """With adapters, as `training.space` makes them."""
        adapters = load_adapters(path, network).attach(network)
        return cls(adapters, adapters.config.masks)

    @classmethod
    def tuned(cls, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, width: int = UNTOLD) -> Self:
        """A network that was tuned to read the mask token of its tokenizer."""
        token, target = tokenizer.mask_token_id, Target.of(network)
        if not isinstance(token, int):
            raise HeadError("space without adapters takes a tokenizer with a mask token, and this one has none")
        if token >= target.vocabulary:
            raise HeadError(f"the tokenizer's mask token is {token}, the target knows 0..{target.vocabulary - 1}")
        return cls(MaskToken(target.embedding[token]), width)

    def proposer(self) -> "Candidates":
        return Candidates()

    def propose(self, wishes: Sequence[Wish["Candidates"]]) -> list[Proposal]:
        return [self._tree(wish) for wish in wishes]

    def _tree(self, wish: Wish["Candidates"]) -> Proposal:
        """The candidates, and groups where the text may well end after this pass, the likeliest places first."""
        foreseen = wish.proposer.foreseen
        chances = list(accumulate(foreseen.likely, mul))
        kept = sum(1 for chance in chances[: min(wish.depth, wish.most)] if chance >= wish.floor)
        tokens, likely = list(foreseen.tokens[:kept]), chances[:kept]
        parents = list(range(-1, kept - 1))
        # That the text ends behind a candidate: it comes, and the next one does not.
        ends = [come - more for come, more in zip((1.0, *likely), (*likely, 0.0), strict=True)]
        for place in sorted(range(kept + 1), key=lambda place: -ends[place]):
            width = min(self.width, wish.most - len(tokens))
            if width < 1 or (ends[place] < wish.floor and len(tokens) > kept):
                break
            parents += [place - 1, *range(len(tokens), len(tokens) + width - 1)]
            tokens += [MASK] * width
            likely += [ends[place]] * width
        return Proposal(tokens, parents, likely)


NONE = Foreseen((), ())


class Candidates:
    """Of one request: what the masks said last."""

    def __init__(self) -> None:
        self.foreseen = NONE

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        self.foreseen = foreseen or NONE
