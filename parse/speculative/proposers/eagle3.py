"""EAGLE-3: a head drafts token by token, each guess of a feature fed back with the token that was guessed.

What it has drafted is forgotten with the next tokens of the text, whose true features take its place.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parse.speculative.proposal import Proposal, ProposalRequest
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import Attend, EagleHead, ProposerLoadError, TargetModel
from parse.speculative.proposers.head_proposer import MASKED, HeadProposer, HeadState, attention, run_head

STEPS_PER_SYNC = 4  # steps of drafting between two looks at whether to go on


class Eagle3Proposer(HeadProposer):
    """A head ready to draft, for any number of requests.

    Its tree: the `beam` likeliest tokens come first; then `depth` times each of the beam's nodes gets its `beam`
    likeliest children, and the best of those by probability from the root on are the next beam. Of all nodes seen
    the likeliest are proposed, down to the floor; once the whole beam lies below it, nobody drafts on. With `beam=1`
    that is a chain of `depth + 1` tokens.
    """

    def __init__(self, head: EagleHead, embedding: Tensor, *, depth: int = 7, beam: int = 10) -> None:
        config = head.config
        if config.num_hidden_layers != 1 or config.parallel_tokens != 1:
            raise ProposerLoadError(
                "not an EAGLE-3 head: it has more than one layer, or proposes several tokens in a pass"
            )
        if depth < 0 or not 1 <= beam <= config.draft_vocab_size:
            raise ProposerLoadError(
                f"depth must be at least 0 and beam in 1..{config.draft_vocab_size}, got {depth}, {beam}"
            )
        super().__init__(head, embedding)
        self.depth, self.beam = depth, beam

    @classmethod
    def load(cls, path: str | Path, network: PreTrainedModel, *, depth: int = 7, beam: int = 10) -> Self:
        return cls(*load_head(path, TargetModel.of(network)), depth=depth, beam=beam)

    def _propose_trees(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        """Below, R texts have B nodes in their beams, and every level adds N nodes: first B, then B * B."""
        states = [wish.state for wish in requests]
        depth = min(self.depth, max(min(wish.max_tokens, wish.max_depth) for wish in requests) - 1)
        count, beam = len(states), self.beam
        for state in states:
            state.reserve(self.head, depth * beam)
        hidden = run_head(self.head, self.embedding, self._rotary, states)  # [R, 1, H]
        scores, tokens = self._top_children(hidden)  # [R, 1, B]
        scores, tokens = scores[:, 0], tokens[:, 0]
        hidden = hidden.expand(-1, beam, -1)
        all_scores, all_tokens = [scores], [tokens]  # [R, N] each
        all_parents = [tokens.new_full((count, beam), -1)]
        node = torch.arange(beam, device=tokens.device).expand(count, -1)  # of the beam, among all nodes
        # [R, B, depth * B]: which of the drafted elements each of the beam's sees; a chain sees them all.
        mask = hidden.new_full((count, beam, depth * beam), MASKED) if beam > 1 else None
        own = torch.arange(beam, device=tokens.device)
        min_logprobs = scores.new_tensor([_log(wish.min_probability) for wish in requests])
        for level in range(depth):
            # To ask is to wait for the device, which a CPU never lets one.
            if (scores.is_cpu or level % STEPS_PER_SYNC == STEPS_PER_SYNC - 1) and bool(
                (scores[:, 0] < min_logprobs).all()
            ):
                break
            if mask is not None:
                mask[:, own, level * beam + own] = 0.0
            hidden = self._expand(states, tokens, hidden, level, mask)
            logprobs, children = self._top_children(hidden)
            sums = (scores[..., None] + logprobs).flatten(1)  # [R, B * B]
            children = children.flatten(1)
            all_scores.append(sums)
            all_tokens.append(children)
            all_parents.append(node.repeat_interleave(beam, 1))
            if level == depth - 1:
                break
            scores, best = sums.topk(beam)
            node = beam * (1 + level * beam) + best
            tokens = children.gather(1, best)
            parent_rank = best // beam
            hidden = hidden.gather(1, parent_rank[..., None].expand(hidden.shape))
            if mask is not None:
                mask = mask.gather(1, parent_rank[..., None].expand(mask.shape))
        return _select_nodes(
            torch.cat(all_scores, 1), torch.cat(all_tokens, 1), torch.cat(all_parents, 1), beam, requests
        )

    def _top_children(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and target's tokens of the likeliest behind each, [..., B]."""
        logprobs, tokens = self.head.logits(hidden).log_softmax(-1).topk(self.beam)
        return logprobs, self.head.to_target[tokens]

    def _expand(
        self, states: Sequence[HeadState], tokens: Tensor, hidden: Tensor, level: int, mask: Tensor | None
    ) -> Tensor:
        """What the head makes of the beam's nodes, [R, B, H]."""
        shape, beam = hidden.shape, self.beam
        rotation = self._rotary.cos_sin([text.length - 1 + level for text in states for _ in range(beam)])
        return self.head(
            self.embedding[tokens.flatten()],
            hidden.reshape(-1, shape[-1]),
            rotation,
            self._draft_attention(states, level, mask),
        ).view(shape)

    def _draft_attention(self, states: Sequence[HeadState], level: int, mask: Tensor | None) -> Attend:
        beam = self.beam

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = []
            for place, text in enumerate(states):
                rows = slice(place * beam, (place + 1) * beam)
                start, end = text.num_elements + level * beam, text.num_elements + (level + 1) * beam
                text.keys[layer, :, start:end] = key[rows].transpose(0, 1)
                text.values[layer, :, start:end] = value[rows].transpose(0, 1)
                seen = None
                if mask is not None:
                    seen = mask.new_zeros(beam, end)
                    seen[:, text.num_elements :] = mask[place, :, : end - text.num_elements]
                out.append(attention(query[rows], text.keys[layer, :, :end], text.values[layer, :, :end], seen))
            return out[0] if len(out) == 1 else torch.cat(out)

        return attend


def _select_nodes(
    scores: Tensor, tokens: Tensor, parents: Tensor, beam: int, requests: Sequence[ProposalRequest[HeadState]]
) -> list[Proposal]:
    """Of each row's nodes; a child is never likelier than its parent, and among equals the earlier one counts."""
    max_tokens = max(wish.max_tokens for wish in requests)
    num_allowed = torch.tensor([[beam + (wish.max_depth - 1) * beam**2] for wish in requests], device=scores.device)
    scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= num_allowed, -math.inf)
    ranked = scores.sort(descending=True, stable=True)
    rows = zip(requests, *(part[:, :max_tokens].tolist() for part in (ranked.indices, ranked.values)), strict=True)
    proposals = []
    for (wish, nodes, likely), all_tokens, all_parents in zip(rows, tokens.tolist(), parents.tolist(), strict=True):
        floor = _log(wish.floor)
        num_selected = sum(1 for logprob in likely[: wish.most] if logprob >= floor and logprob > -math.inf)
        chosen = sorted(zip(nodes[:num_selected], likely[:num_selected], strict=True))
        place = {node: at for at, (node, _) in enumerate(chosen)}
        proposals.append(
            Proposal(
                tuple(all_tokens[node] for node, _ in chosen),
                tuple(place.get(all_parents[node], -1) for node, _ in chosen),
                tuple(math.exp(logprob) for _, logprob in chosen),
            )
        )
    return proposals


def _log(floor: float) -> float:
    return math.log(floor) if floor > 0 else -math.inf
