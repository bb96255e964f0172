"""EAGLE-3: a head proposes token by token from the target's hidden states.

The first step reads the target's hidden states. Each further step reads the head's own output of the step before, and
the token that was proposed there. When the sequence grows, the proposed elements are dropped, and the target's hidden
states replace them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parse.config import SpeculativeConfig
from parse.speculative.proposal import Proposal, ProposalRequest
from parse.speculative.proposers.base import DEFAULT_CHAIN_LENGTH, LoadContext, LoadedProposer, ProposerLoadError
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import Attend, EagleHead, TargetModel
from parse.speculative.proposers.head_proposer import MASKED, HeadProposer, HeadState, attention, run_head

DEFAULT_TREE_DEPTH = 8  # tokens on one path
STEPS_PER_SYNC = 4  # drafting steps between two checks of whether to continue, each of which waits for the device


def load(config: SpeculativeConfig, load_context: LoadContext) -> LoadedProposer:
    """Loads a head. With `topk` 1 it proposes chains, otherwise trees."""
    assert config.model is not None, "the settings require a model"
    if config.topk == 1:
        depth = max_tokens = config.num_speculative_tokens or DEFAULT_CHAIN_LENGTH
    else:
        max_tokens = config.num_speculative_tokens or 2 * DEFAULT_TREE_DEPTH
        depth = min(max_tokens, DEFAULT_TREE_DEPTH)
    proposer = Eagle3Proposer.load(config.model, load_context.network, depth=depth - 1, topk=config.topk)
    return LoadedProposer(proposer, max_tokens)


class Eagle3Proposer(HeadProposer):
    """A head that proposes for any number of requests.

    The `topk` most likely tokens are the first level of the tree and the first beam. A further level gives each node of
    the beam its `topk` most likely children. The `topk` children with the most likely paths are the next beam. There
    are at most `depth` further levels. The most likely nodes of all levels are proposed, if their probability is at
    least `min_probability`. Drafting ends early when no node of the beam is that likely. With `topk=1` the result is a
    chain of `depth + 1` tokens.
    """

    def __init__(self, head: EagleHead, embedding: Tensor, *, depth: int = 7, topk: int = 10) -> None:
        config = head.config
        if config.num_hidden_layers != 1 or config.parallel_tokens != 1:
            raise ProposerLoadError(
                "this is not an EAGLE-3 head: it has more than one layer, or proposes several tokens in a pass"
            )
        if depth < 0 or not 1 <= topk <= config.draft_vocab_size:
            raise ProposerLoadError(
                f"depth must be at least 0 and topk in 1..{config.draft_vocab_size}, got {depth}, {topk}"
            )
        super().__init__(head, embedding)
        self.depth, self.topk = depth, topk

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel, *, depth: int = 7, topk: int = 10) -> Self:
        return cls(*load_head(path, TargetModel.of(network)), depth=depth, topk=topk)

    def _propose_trees(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        """Proposes a tree for each request.

        In the shapes, R is the number of requests and B the number of nodes in a beam, `topk`. A level adds N nodes:
        first B, then B * B.
        """
        states = [request.state for request in requests]
        depth = min(self.depth, max(min(request.max_tokens, request.max_depth) for request in requests) - 1)
        count, topk = len(states), self.topk
        for state in states:
            state.reserve(self.head, depth * topk)
        hidden = run_head(self.head, self.embedding, self._rotary, states)  # [R, 1, H]
        scores, tokens = self._top_children(hidden)  # [R, 1, B]
        scores, tokens = scores[:, 0], tokens[:, 0]
        hidden = hidden.expand(-1, topk, -1)
        all_scores, all_tokens = [scores], [tokens]  # [R, N] each
        all_parents = [tokens.new_full((count, topk), -1)]
        beam_nodes = torch.arange(topk, device=tokens.device).expand(count, -1)  # indices into all nodes
        # [R, B, depth * B]: which proposed elements each node of the beam sees. In a chain it sees all of them.
        mask = hidden.new_full((count, topk, depth * topk), MASKED) if topk > 1 else None
        beam_indices = torch.arange(topk, device=tokens.device)
        min_logprobs = scores.new_tensor([_log(request.min_probability) for request in requests])
        for level in range(depth):
            # Reading a value waits for a GPU, so it is done every few steps. A CPU has nothing to wait for.
            if (scores.is_cpu or level % STEPS_PER_SYNC == STEPS_PER_SYNC - 1) and bool(
                (scores[:, 0] < min_logprobs).all()
            ):
                break
            if mask is not None:
                mask[:, beam_indices, level * topk + beam_indices] = 0.0
            hidden = self._expand(states, tokens, hidden, level, mask)
            logprobs, children = self._top_children(hidden)
            path_scores = (scores[..., None] + logprobs).flatten(1)  # [R, B * B]
            children = children.flatten(1)
            all_scores.append(path_scores)
            all_tokens.append(children)
            all_parents.append(beam_nodes.repeat_interleave(topk, 1))
            if level == depth - 1:
                break
            scores, best = path_scores.topk(topk)
            beam_nodes = topk * (1 + level * topk) + best
            tokens = children.gather(1, best)
            parent_rank = best // topk
            hidden = hidden.gather(1, parent_rank[..., None].expand(hidden.shape))
            if mask is not None:
                mask = mask.gather(1, parent_rank[..., None].expand(mask.shape))
        return _select_nodes(
            torch.cat(all_scores, 1), torch.cat(all_tokens, 1), torch.cat(all_parents, 1), topk, requests
        )

    def _top_children(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the most likely children of each element, [..., B].

        The results are their log-probabilities and the target's token ids.
        """
        logprobs, tokens = self.head.logits(hidden).float().log_softmax(-1).topk(self.topk)
        return logprobs, self.head.to_target[tokens]

    def _expand(
        self, states: Sequence[HeadState], tokens: Tensor, hidden: Tensor, level: int, mask: Tensor | None
    ) -> Tensor:
        """Runs the head on the nodes of the beams; its output is [R, B, H]."""
        shape, topk = hidden.shape, self.topk
        rotation = self._rotary.cos_sin([state.length - 1 + level for state in states for _ in range(topk)])
        return self.head(
            self.embedding[tokens.flatten()],
            hidden.reshape(-1, shape[-1]),
            rotation,
            self._draft_attention(states, level, mask),
        ).view(shape)

    def _draft_attention(self, states: Sequence[HeadState], level: int, mask: Tensor | None) -> Attend:
        """Returns the attention of proposed elements to their sequence and ancestors.

        It also stores their keys and values.
        """
        topk = self.topk

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outputs = []
            for index, state in enumerate(states):
                nodes = slice(index * topk, (index + 1) * topk)
                start, end = state.num_elements + level * topk, state.num_elements + (level + 1) * topk
                state.keys[layer, :, start:end] = key[nodes].transpose(0, 1)
                state.values[layer, :, start:end] = value[nodes].transpose(0, 1)
                full_mask = None
                if mask is not None:
                    full_mask = mask.new_zeros(topk, end)
                    full_mask[:, state.num_elements :] = mask[index, :, : end - state.num_elements]
                keys, values = state.keys[layer, :, :end], state.values[layer, :, :end]
                outputs.append(attention(query[nodes], keys, values, full_mask))
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attend


def _select_nodes(
    scores: Tensor, tokens: Tensor, parents: Tensor, topk: int, requests: Sequence[ProposalRequest[HeadState]]
) -> list[Proposal]:
    """Returns the most likely nodes for each request.

    `scores`, `tokens` and `parents` are [R, nodes].

    A child is never more likely than its parent. Among nodes of equal probability, the earlier one is preferred. The
    parent of a selected node is therefore always selected too.
    """
    max_tokens = max(request.max_tokens for request in requests)
    num_allowed = torch.tensor(
        [[topk + (request.max_depth - 1) * topk**2] for request in requests], device=scores.device
    )
    scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= num_allowed, -math.inf)
    ranked = scores.sort(descending=True, stable=True)
    results = zip(
        requests,
        ranked.indices[:, :max_tokens].tolist(),
        ranked.values[:, :max_tokens].tolist(),
        tokens.tolist(),
        parents.tolist(),
        strict=True,
    )
    proposals = []
    for request, ranked_nodes, logprobs, node_tokens, node_parents in results:
        min_logprob = _log(request.min_probability)
        num_selected = sum(
            1 for logprob in logprobs[: request.max_tokens] if logprob >= min_logprob and logprob > -math.inf
        )
        selected = sorted(zip(ranked_nodes[:num_selected], logprobs[:num_selected], strict=True))
        new_index = {node: index for index, (node, _) in enumerate(selected)}
        proposals.append(
            Proposal(
                tuple(node_tokens[node] for node, _ in selected),
                tuple(new_index.get(node_parents[node], -1) for node, _ in selected),
                tuple(math.exp(logprob) for _, logprob in selected),
            )
        )
    return proposals


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
