"""ParallelSpec: one pass of a head proposes several tokens, from masks that follow the last element of the text."""

from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parse.speculate.checkpoint import load_head
from parse.speculate.head import Head, HeadError, Rotation, Target
from parse.speculate.proposal import Proposal
from parse.speculate.texts import Text, read


class Parallel:
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
        self.head, self.embedding, self.beam = head, embedding, beam
        self._rotation = Rotation(config, head.fc)

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel, *, beam: int = 1) -> Self:
        return cls(*load_head(path, Target.of(network)), beam=beam)

    @property
    def taps(self) -> tuple[int, ...]:
        """Which of the target's `hidden_states` are its features, side by side."""
        return self.head.config.taps

    def proposer(self) -> "ParallelProposer":
        return ParallelProposer(self)

    @torch.inference_mode()
    def propose(self, proposers: "Sequence[ParallelProposer]", most: int) -> list[Proposal]:
        """For all of them, in one pass."""
        ready = [proposer.text for proposer in proposers if proposer.text.ready]
        if most < 1 or not ready:
            return [Proposal()] * len(proposers)
        ahead = min(most, self.head.config.parallel_tokens)
        for text in ready:
            text.reserve(self.head, ahead - 1)
        hidden = read(self.head, self.embedding, self._rotation, ready, ahead - 1)  # [R, S, H]
        likely, tokens = self.head.logits(hidden).log_softmax(-1).topk(self.beam)  # [R, S, beam]
        tokens = self.head.to_target[tokens]
        found = iter([_tree(*rows, most) for rows in zip(likely.tolist(), tokens.tolist(), strict=True)])
        return [next(found) if proposer.text.ready else Proposal() for proposer in proposers]


class ParallelProposer:
    """For one request; the keys and values of its text are its own."""

    def __init__(self, method: Parallel) -> None:
        self._method = method
        self.text = Text()

    def take(self, tokens: Sequence[int], features: Tensor | None) -> None:
        self.text.take(tokens, features)

    def propose(self, most: int) -> Proposal:
        return self._method.propose([self], most)[0]


def _tree(likely: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], most: int) -> Proposal:
    """The `most` likeliest nodes of all rows of choices; log-probabilities and tokens are [S, beam], best first."""
    if len(tokens[0]) == 1:
        chain = tuple(row[0] for row in tokens)
        return Proposal(chain, tuple(range(-1, len(chain) - 1)))
    # Best first: a node is no likelier than its parent or the sibling before it, so these lead to all others.
    chosen: list[int] = []
    parents: list[int] = []
    open_nodes = [(-likely[0][0], 0, 0, -1)]  # with its place, its rank among the siblings, its parent
    while open_nodes and len(chosen) < most:
        cost, place, rank, parent = heappop(open_nodes)
        node = len(chosen)
        chosen.append(tokens[place][rank])
        parents.append(parent)
        if rank + 1 < len(tokens[place]):
            heappush(open_nodes, (cost + likely[place][rank] - likely[place][rank + 1], place, rank + 1, parent))
        if place + 1 < len(tokens):
            heappush(open_nodes, (cost - likely[place + 1][0], place + 1, 0, node))
    return Proposal(tuple(chosen), tuple(parents))
