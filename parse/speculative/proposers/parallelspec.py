"""ParallelSpec: one pass of a head proposes several tokens, from masks that follow the last element of the text."""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel

from parse.speculative.proposal import Proposal, Wish
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import Head, HeadError, Target
from parse.speculative.proposers.head_proposer import HeadMethod, Text, read


class Parallel(HeadMethod):
    """A head ready to propose, for any number of requests.

    Place s of a proposal has a distribution of its own, which does not know what was chosen for the places before.
    The tree holds the likeliest rows of choices, as if the places had nothing to do with each other; with `beam=1`
    that is the chain of each place's likeliest token.
    """

    def __init__(self, head: Head, embedding: Tensor, *, beam: int = 1) -> None:
        config = head.config
        if config.parallel_tokens < 2:
            raise HeadError("not a parallel head: it proposes one token in a pass")
        if not 1 <= beam <= config.draft_vocab_size:
            raise HeadError(f"beam must lie in 1..{config.draft_vocab_size}, got {beam}")
        super().__init__(head, embedding)
        self.beam = beam

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel, *, beam: int = 1) -> Self:
        return cls(*load_head(path, Target.of(network)), beam=beam)

    def _trees(self, wishes: Sequence[Wish[Text]]) -> list[Proposal]:
        texts = [wish.proposer for wish in wishes]
        ahead = min(max(min(wish.most, wish.depth) for wish in wishes), self.head.config.parallel_tokens)
        for text in texts:
            text.reserve(self.head, ahead - 1)
        hidden = read(self.head, self.embedding, self._rotation, texts, ahead - 1)  # [R, S, H]
        likely, tokens = self.head.logits(hidden).log_softmax(-1).topk(self.beam)  # [R, S, beam]
        rows = zip(likely.tolist(), self.head.to_target[tokens].tolist(), wishes, strict=True)
        return [_tree(chances[: wish.depth], ids, wish.most, wish.floor) for chances, ids, wish in rows]


def _tree(likely: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], most: int, floor: float) -> Proposal:
    """The likeliest nodes of all rows of choices; log-probabilities and tokens are [S, beam], best first."""
    # Best first: a node is no likelier than its parent or the sibling before it, so these lead to all others.
    least = math.log(floor) if floor > 0 else -math.inf
    chosen: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    open_nodes = [(-likely[0][0], 0, 0, -1)]  # with its place, its rank among the siblings, its parent
    while open_nodes and len(chosen) < most:
        cost, place, rank, parent = heappop(open_nodes)
        if -cost < least:
            break
        node = len(chosen)
        chosen.append(tokens[place][rank])
        parents.append(parent)
        chances.append(math.exp(-cost))
        if rank + 1 < len(tokens[place]):
            heappush(open_nodes, (cost + likely[place][rank] - likely[place][rank + 1], place, rank + 1, parent))
        if place + 1 < len(likely):
            heappush(open_nodes, (cost - likely[place + 1][0], place + 1, 0, node))
    return Proposal(tuple(chosen), tuple(parents), tuple(chances))
