"""Texts as a head has read them: keys and values of each, and what of them it has yet to read.

Reading waits until somebody proposes: a text that nobody proposes for costs no pass, and several are read in one.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parse.speculative.proposal import NO_PROPOSAL, NOT_YET, MaskPrediction, Proposal, ProposalRequest, Proposer
from parse.speculative.proposers.eagle_head import Attend, EagleHead, Index, RotaryEmbedding

MASKED = float("-inf")
MAX_BMM_QUERIES = 32  # queries
MAX_PREFILL_TOKENS = 512  # elements at a time: a long prompt must not stall everybody's next token


class HeadState:
    """One request's. The element at position p stands for token p + 1 and the feature of token p."""

    def __init__(self) -> None:
        self.length = 0  # tokens taken
        self.num_computed = 0  # elements whose keys and values are in memory
        # Elements yet to be read; the last one stays, to be read again by who asks again.
        self.pending_token_ids: list[int] = []
        self.pending_positions: list[int] = []
        self.pending_hidden_states: list[Tensor] = []
        self.keys = self.values = torch.empty(0)  # [layers, key heads, capacity, d]

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None = None
    ) -> None:
        count = 0 if hidden_states is None else len(hidden_states)
        if count > min(len(tokens), self.length + len(tokens) - 1):
            raise ValueError(f"{count} rows of features are too many for {len(tokens)} tokens after {self.length}")
        self.length += len(tokens)
        if hidden_states is not None and count:  # it takes the place of whatever memory the features come from
            self.pending_token_ids += tokens[len(tokens) - count :]
            self.pending_positions += range(self.length - 1 - count, self.length - 1)
            self.pending_hidden_states.append(hidden_states.clone())

    @property
    def is_ready(self) -> bool:
        """Is the last token's element known?"""
        return bool(self.pending_positions) and self.pending_positions[-1] == self.length - 2

    @property
    def num_elements(self) -> int:
        """Elements in all."""
        return self.num_computed + len(self.pending_token_ids)

    def reserve(self, head: EagleHead, num_draft_elements: int) -> None:
        """Memory for all elements and that many drafted ones."""
        needed, capacity = self.num_elements + num_draft_elements, self.keys.shape[2] if self.keys.ndim == 4 else 0
        if needed <= capacity:
            return
        config = head.config
        shape = config.num_hidden_layers, config.num_key_value_heads, max(256, 2 * needed), config.head_dim
        for name in ("keys", "values"):
            old, new = getattr(self, name), head.fc.new_empty(shape)
            if self.num_computed:
                new[:, :, : self.num_computed] = old[:, :, : self.num_computed]
            setattr(self, name, new)


class HeadProposer(Proposer[HeadState]):
    """What methods with a head have in common; they differ in how they come to their trees."""

    def __init__(self, head: EagleHead, embedding: Tensor) -> None:
        self.head, self.embedding = head, embedding
        self._rotary = RotaryEmbedding(head.config, head.fc)
        config = head.config
        self.aux_hidden_state_layers = config.aux_hidden_state_layers
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.bytes_per_token = numbers * head.fc.element_size()

    def new_state(self) -> HeadState:
        return HeadState()

    @torch.inference_mode()
    def propose(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        """For all of them, in the same passes."""
        self._prefill_long([wish.state for wish in requests])
        able = [
            wish.state.is_ready and wish.max_tokens > 0 and len(wish.state.pending_token_ids) <= MAX_PREFILL_TOKENS
            for wish in requests
        ]
        ready = [wish for wish, can in zip(requests, able, strict=True) if can]
        found = iter(self._propose_trees(ready) if ready else ())
        return [
            next(found) if can else NOT_YET if wish.state.is_ready else NO_PROPOSAL
            for wish, can in zip(requests, able, strict=True)
        ]

    def _prefill_long(self, states: Sequence[HeadState]) -> None:
        """A piece of those that have much to read."""
        budget = MAX_PREFILL_TOKENS
        for text in states:
            count = min(len(text.pending_token_ids) - 1, budget)
            if len(text.pending_token_ids) > MAX_PREFILL_TOKENS and count > 0:
                budget -= count
                prefill(self.head, self.embedding, self._rotary, text, count)

    @abstractmethod
    def _propose_trees(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]: ...


def prefill(head: EagleHead, embedding: Tensor, rotary: RotaryEmbedding, state: HeadState, count: int) -> None:
    """Only keys and values of its next elements are wanted."""
    state.reserve(head, 0)
    hidden_states = (
        state.pending_hidden_states[0]
        if len(state.pending_hidden_states) == 1
        else torch.cat(state.pending_hidden_states)
    )
    tokens = torch.tensor(state.pending_token_ids[:count], device=embedding.device)
    turn = rotary.cos_sin(state.pending_positions[:count])
    attend = _pending_attention([state], [count], 1, len(head.layers) - 1)
    head(embedding[tokens], head.fuse(hidden_states[:count]), turn, attend, slice(count - 1, None))
    state.num_computed += count
    del state.pending_token_ids[:count], state.pending_positions[:count]
    state.pending_hidden_states = [hidden_states[count:]]


def run_head(
    head: EagleHead,
    embedding: Tensor,
    rotary: RotaryEmbedding,
    states: Sequence[HeadState],
    masks: int = 0,
) -> Tensor:
    """What the head makes of the last element of each text, and of masks behind it: [texts, 1 + masks, H].

    All that is yet to be read is read, packed into one pass; masks leave nothing that counts.
    """
    counts = [len(text.pending_token_ids) for text in states]
    hidden_states = [rows for text in states for rows in text.pending_hidden_states]
    tokens = torch.tensor([token for text in states for token in text.pending_token_ids], device=embedding.device)
    positions = [
        at for text in states for at in (*text.pending_positions, *range(text.length - 1, text.length - 1 + masks))
    ]
    hidden = head.fuse(hidden_states[0] if len(hidden_states) == 1 else torch.cat(hidden_states))
    embedded = embedding[tokens]
    if masks:
        fill = head.mask_embedding.expand(masks, -1), head.mask_hidden.expand(masks, -1)
        embedded, hidden = (
            torch.cat([rows for part in known.split(counts) for rows in (part, mask)])
            for known, mask in zip((embedded, hidden), fill, strict=True)
        )
    if len(states) == 1:
        keep: Index = slice(len(positions) - 1 - masks, None)
    else:
        ends = list(accumulate(count + masks for count in counts))
        keep = torch.cat([torch.arange(end - 1 - masks, end, device=tokens.device) for end in ends])
    turn = rotary.cos_sin(positions)
    sizes = [count + masks for count in counts]
    out = head(embedded, hidden, turn, _pending_attention(states, sizes, 1 + masks, len(head.layers) - 1), keep)
    for text in states:
        text.num_computed += len(text.pending_token_ids) - 1
        del text.pending_token_ids[:-1], text.pending_positions[:-1]
        text.pending_hidden_states = [text.pending_hidden_states[-1][-1:]]
    return out.view(len(states), 1 + masks, -1)


def _pending_attention(states: Sequence[HeadState], sizes: Sequence[int], last: int, top: int) -> Attend:
    """Causal attention of each text's new elements; in the topmost layer only of the last ones."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = []
        queries = query.split([last] * len(states) if layer == top else list(sizes))
        rows = zip(states, queries, key.split(list(sizes)), value.split(list(sizes)), strict=True)
        for text, asked, keys, values in rows:
            seen = text.num_computed + len(keys)
            text.keys[layer, :, text.num_computed : seen] = keys.transpose(0, 1)
            text.values[layer, :, text.num_computed : seen] = values.transpose(0, 1)
            mask = None
            if len(asked) > 1:
                mask = asked.new_full((len(asked), seen), MASKED).triu(seen - len(asked) + 1)
            out.append(attention(asked, text.keys[layer, :, :seen], text.values[layer, :, :seen], mask))
        return out[0] if len(out) == 1 else torch.cat(out)

    return attend


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries [Q, heads, d] over keys [key heads, T, d], with an additive mask [Q, T], to [Q, heads * d].

    For the few queries of a draft plain products take less time than the CPU's fused kernel; for the many of a prompt
    they would take too much memory.
    """
    size, heads, width = query.shape
    groups = keys.shape[0]
    if size > MAX_BMM_QUERIES:
        rows = query.transpose(0, 1)[None], keys[None], values[None]
        fused = scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=groups != heads)
        return fused[0].transpose(0, 1).reshape(size, -1)
    scores = torch.bmm(
        (query * (1 / math.sqrt(width))).transpose(0, 1).reshape(groups, -1, width), keys.transpose(1, 2)
    )
    if mask is not None:
        scores.view(heads, size, -1).add_(mask)
    mixed = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)
    return mixed.view(heads, size, width).transpose(0, 1).reshape(size, -1)
