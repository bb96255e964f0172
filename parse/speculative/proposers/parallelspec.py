"""ParallelSpec: one pass of a head proposes several tokens, from masks that follow the last element of the text."""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel

from parse.speculative.proposal import Proposal, ProposalRequest
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import EagleHead, ProposerLoadError, TargetModel
from parse.speculative.proposers.head_proposer import HeadProposer, HeadState, run_head


class ParallelSpecProposer(HeadProposer):
    """A head ready to propose, for any number of requests.

    Place s of a proposal has a distribution of its own, which does not know what was chosen for the places before.
    The tree holds the likeliest rows of choices, as if the places had nothing to do with each other; with `beam=1`
    that is the chain of each place's likeliest token.
    """

    def __init__(self, head: EagleHead, embedding: Tensor, *, beam: int = 1) -> None:
        config = head.config
        if config.parallel_tokens < 2:
            raise ProposerLoadError("not a parallel head: it proposes one token in a pass")
        if not 1 <= beam <= config.draft_vocab_size:
            raise ProposerLoadError(f"beam must lie in 1..{config.draft_vocab_size}, got {beam}")
        super().__init__(head, embedding)
        self.beam = beam

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel, *, beam: int = 1) -> Self:
        return cls(*load_head(path, TargetModel.of(network)), beam=beam)

    def _propose_trees(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        states = [wish.state for wish in requests]
        num_tokens = min(
            max(min(wish.max_tokens, wish.max_depth) for wish in requests), self.head.config.parallel_tokens
        )
        for state in states:
            state.reserve(self.head, num_tokens - 1)
        hidden = run_head(self.head, self.embedding, self._rotary, states, num_tokens - 1)  # [R, S, H]
        logprobs, tokens = self.head.logits(hidden).log_softmax(-1).topk(self.beam)  # [R, S, beam]
        rows = zip(logprobs.tolist(), self.head.to_target[tokens].tolist(), requests, strict=True)
        return [
            _best_first_tree(chances[: wish.max_depth], ids, wish.max_tokens, wish.min_probability)
            for chances, ids, wish in rows
        ]


def _best_first_tree(
    logprobs: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], max_tokens: int, min_probability: float
) -> Proposal:
    """The likeliest nodes of all rows of choices; log-probabilities and tokens are [S, beam], best first."""
    # Best first: a node is no likelier than its parent or the sibling before it, so these lead to all others.
    min_logprob = math.log(min_probability) if min_probability > 0 else -math.inf
    token_ids: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    open_nodes = [(-logprobs[0][0], 0, 0, -1)]  # with its place, its rank among the siblings, its parent
    while open_nodes and len(token_ids) < max_tokens:
        cost, place, rank, parent = heappop(open_nodes)
        if -cost < min_logprob:
            break
        node = len(token_ids)
        token_ids.append(tokens[place][rank])
        parents.append(parent)
        probabilities.append(math.exp(-cost))
        if rank + 1 < len(tokens[place]):
            heappush(open_nodes, (cost + logprobs[place][rank] - logprobs[place][rank + 1], place, rank + 1, parent))
        if place + 1 < len(logprobs):
            heappush(open_nodes, (cost - logprobs[place + 1][0], place + 1, 0, node))
    return Proposal(tuple(token_ids), tuple(parents), tuple(probabilities))
