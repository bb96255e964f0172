"""ParallelSpec: one pass of a head proposes several tokens.

The head predicts the first one at the last element of the sequence, and the others at masks after it.
"""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel

from parse.config import SpeculativeConfig
from parse.speculative.proposal import Proposal, ProposalRequest
from parse.speculative.proposers.base import LoadContext, LoadedProposer, ProposerLoadError
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import EagleHead, TargetModel
from parse.speculative.proposers.head_proposer import HeadProposer, HeadState, run_head


def load(config: SpeculativeConfig, load_context: LoadContext) -> LoadedProposer:
    """Loads a head.

    By default a chain is as long as the head was trained for, and a tree has twice as many tokens.
    """
    assert config.model is not None, "the settings require a model"
    proposer = ParallelSpecProposer.load(config.model, load_context.network, topk=config.topk)
    parallel_tokens = proposer.head.config.parallel_tokens
    default_tokens = 2 * parallel_tokens if config.topk > 1 else parallel_tokens
    return LoadedProposer(proposer, config.num_speculative_tokens or default_tokens)


class ParallelSpecProposer(HeadProposer):
    """A head that proposes for any number of requests.

    Each position of a proposal has its own distribution. It does not depend on the tokens that were chosen for the
    positions before it. The tree holds the most likely paths, as if the positions were independent. With `topk=1` it is
    a chain of the most likely token of each position.
    """

    def __init__(self, head: EagleHead, embedding: Tensor, *, topk: int = 1) -> None:
        config = head.config
        if config.parallel_tokens < 2:
            raise ProposerLoadError("this is not a parallel head: it proposes one token in a pass")
        if not 1 <= topk <= config.draft_vocab_size:
            raise ProposerLoadError(f"topk must lie in 1..{config.draft_vocab_size}, got {topk}")
        super().__init__(head, embedding)
        self.topk = topk

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel, *, topk: int = 1) -> Self:
        return cls(*load_head(path, TargetModel.of(network)), topk=topk)

    def _propose_trees(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        states = [request.state for request in requests]
        num_tokens = min(
            max(min(request.max_tokens, request.max_depth) for request in requests), self.head.config.parallel_tokens
        )
        for state in states:
            state.reserve(self.head, num_tokens - 1)
        hidden = run_head(self.head, self.embedding, self._rotary, states, num_tokens - 1)  # [R, positions, H]
        logprobs, tokens = self.head.logits(hidden).float().log_softmax(-1).topk(self.topk)  # [R, positions, topk]
        results = zip(logprobs.tolist(), self.head.to_target[tokens].tolist(), requests, strict=True)
        return [
            _best_first_tree(
                token_logprobs[: request.max_depth], token_ids, request.max_tokens, request.min_probability
            )
            for token_logprobs, token_ids, request in results
        ]


def _best_first_tree(
    logprobs: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], max_tokens: int, min_probability: float
) -> Proposal:
    """Returns the most likely nodes of a tree.

    `logprobs` and `tokens` are [positions, topk], the most likely first.
    """
    # A node is no more likely than its parent and its previous sibling. A best-first search that adds the first child
    # and the next sibling of each node it takes therefore finds the nodes in the order of their probability.
    min_logprob = math.log(min_probability) if min_probability > 0 else -math.inf
    token_ids: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    open_nodes = [(-logprobs[0][0], 0, 0, -1)]  # negative log-probability, position, rank among siblings, parent
    while open_nodes and len(token_ids) < max_tokens:
        cost, position, rank, parent = heappop(open_nodes)
        if -cost < min_logprob:
            break
        node = len(token_ids)
        token_ids.append(tokens[position][rank])
        parents.append(parent)
        probabilities.append(math.exp(-cost))
        if rank + 1 < len(tokens[position]):
            sibling_cost = cost + logprobs[position][rank] - logprobs[position][rank + 1]
            heappush(open_nodes, (sibling_cost, position, rank + 1, parent))
        if position + 1 < len(logprobs):
            heappush(open_nodes, (cost - logprobs[position + 1][0], position + 1, 0, node))
    return Proposal(tuple(token_ids), tuple(parents), tuple(probabilities))
