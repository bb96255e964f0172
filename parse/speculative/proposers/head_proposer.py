"""The code that methods with an EAGLE head share.

It holds each sequence's keys and values, and its elements that are not computed yet.

New elements are computed when a proposal is requested. A sequence without proposals therefore costs no pass of the
head, and several sequences share a pass.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parse.speculative.proposal import NO_PROPOSAL, NOT_READY, MaskPrediction, Proposal, ProposalRequest, Proposer
from parse.speculative.proposers.eagle_head import Attend, EagleHead, Index, RotaryEmbedding

MASKED = float("-inf")
MAX_BMM_QUERIES = 32  # above this number of queries, the fused attention kernel is used
MAX_PREFILL_TOKENS = 512  # elements in one pass, so that a long prompt does not delay the other sequences


class HeadState:
    """State of one sequence.

    The element at position p stands for token p + 1 and the hidden states of token p.
    """

    def __init__(self) -> None:
        self.length = 0  # tokens of the sequence
        self.num_computed = 0  # elements whose keys and values are stored
        # Elements that are not computed yet. The last element stays here after it is computed, for the next proposal.
        self.pending_token_ids: list[int] = []
        self.pending_positions: list[int] = []
        self.pending_hidden_states: list[Tensor] = []
        self.keys = self.values = torch.empty(0)  # [layers, key heads, capacity, d]

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None = None
    ) -> None:
        count = 0 if hidden_states is None else len(hidden_states)
        if count > min(len(tokens), self.length + len(tokens) - 1):
            raise ValueError(f"{count} rows of hidden states are too many for {len(tokens)} tokens after {self.length}")
        self.length += len(tokens)
        if hidden_states is not None and count:
            self.pending_token_ids += tokens[len(tokens) - count :]
            self.pending_positions += range(self.length - 1 - count, self.length - 1)
            self.pending_hidden_states.append(hidden_states.clone())  # the engine reuses the memory of the original

    @property
    def is_ready(self) -> bool:
        """Whether the hidden states for the last token's element have arrived."""
        return bool(self.pending_positions) and self.pending_positions[-1] == self.length - 2

    @property
    def num_elements(self) -> int:
        """The number of elements, computed and pending."""
        return self.num_computed + len(self.pending_token_ids)

    def reserve(self, head: EagleHead, num_draft_elements: int) -> None:
        """Allocates memory for all elements and for `num_draft_elements` more."""
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
    """Base class of the methods with a head.

    They differ in how they build their trees.
    """

    def __init__(self, head: EagleHead, embedding: Tensor) -> None:
        self.head, self.embedding = head, embedding
        self._rotary = RotaryEmbedding(head.config, head.fc)
        config = head.config
        self.aux_hidden_state_layers = config.aux_hidden_state_layers
        values_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.bytes_per_token = values_per_token * head.fc.element_size()

    def new_state(self) -> HeadState:
        return HeadState()

    @torch.inference_mode()
    def propose(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        """Proposes for all requests in the same passes of the head."""
        self._prefill_long([request.state for request in requests])
        can_propose = [
            request.state.is_ready
            and request.max_tokens > 0
            and len(request.state.pending_token_ids) <= MAX_PREFILL_TOKENS
            for request in requests
        ]
        ready_requests = [request for request, can in zip(requests, can_propose, strict=True) if can]
        proposals = iter(self._propose_trees(ready_requests) if ready_requests else ())
        return [
            next(proposals) if can else NOT_READY if request.state.is_ready else NO_PROPOSAL
            for request, can in zip(requests, can_propose, strict=True)
        ]

    def _prefill_long(self, states: Sequence[HeadState]) -> None:
        """Computes a part of the pending elements of long sequences.

        A sequence is long if its pending elements do not fit into one pass.
        """
        budget = MAX_PREFILL_TOKENS
        for state in states:
            count = min(len(state.pending_token_ids) - 1, budget)
            if len(state.pending_token_ids) > MAX_PREFILL_TOKENS and count > 0:
                budget -= count
                prefill(self.head, self.embedding, self._rotary, state, count)

    @abstractmethod
    def _propose_trees(self, requests: Sequence[ProposalRequest[HeadState]]) -> list[Proposal]:
        """Returns one tree for each request. All requests are ready."""


def prefill(head: EagleHead, embedding: Tensor, rotary: RotaryEmbedding, state: HeadState, count: int) -> None:
    """Computes keys and values of the sequence's next `count` elements."""
    state.reserve(head, 0)
    hidden_states = (
        state.pending_hidden_states[0]
        if len(state.pending_hidden_states) == 1
        else torch.cat(state.pending_hidden_states)
    )
    tokens = torch.tensor(state.pending_token_ids[:count], device=embedding.device)
    rotation = rotary.cos_sin(state.pending_positions[:count])
    attend = _pending_attention([state], [count], 1, len(head.layers) - 1)
    head(embedding[tokens], head.fuse(hidden_states[:count]), rotation, attend, slice(count - 1, None))
    state.num_computed += count
    del state.pending_token_ids[:count], state.pending_positions[:count]
    state.pending_hidden_states = [hidden_states[count:]]


def run_head(
    head: EagleHead,
    embedding: Tensor,
    rotary: RotaryEmbedding,
    states: Sequence[HeadState],
    num_masks: int = 0,
) -> Tensor:
    """Returns the head's output, [sequences, 1 + masks, H].

    The output belongs to each sequence's last element and to the masks after it.

    Computes all pending elements of all sequences, packed into one pass. The keys and values of masks are not kept.
    """
    counts = [len(state.pending_token_ids) for state in states]
    hidden_states = [part for state in states for part in state.pending_hidden_states]
    tokens = torch.tensor([token for state in states for token in state.pending_token_ids], device=embedding.device)
    positions = [
        position
        for state in states
        for position in (*state.pending_positions, *range(state.length - 1, state.length - 1 + num_masks))
    ]
    hidden = head.fuse(hidden_states[0] if len(hidden_states) == 1 else torch.cat(hidden_states))
    embedded = embedding[tokens]
    if num_masks:
        embedded = _insert_after_each(embedded, counts, head.mask_embedding.expand(num_masks, -1))
        hidden = _insert_after_each(hidden, counts, head.mask_hidden.expand(num_masks, -1))
    if len(states) == 1:
        keep: Index = slice(len(positions) - 1 - num_masks, None)
    else:
        chunk_ends = list(accumulate(count + num_masks for count in counts))
        keep = torch.cat([torch.arange(end - 1 - num_masks, end, device=tokens.device) for end in chunk_ends])
    rotation = rotary.cos_sin(positions)
    sizes = [count + num_masks for count in counts]
    attend = _pending_attention(states, sizes, 1 + num_masks, len(head.layers) - 1)
    output = head(embedded, hidden, rotation, attend, keep)
    for state in states:
        state.num_computed += len(state.pending_token_ids) - 1
        del state.pending_token_ids[:-1], state.pending_positions[:-1]
        state.pending_hidden_states = [state.pending_hidden_states[-1][-1:]]
    return output.view(len(states), 1 + num_masks, -1)


def _insert_after_each(elements: Tensor, counts: Sequence[int], inserted: Tensor) -> Tensor:
    """Inserts the same elements after each group of `elements`.

    `counts` are the sizes of the groups.
    """
    return torch.cat([part for group in elements.split(list(counts)) for part in (group, inserted)])


def _pending_attention(states: Sequence[HeadState], sizes: Sequence[int], num_outputs: int, last_layer: int) -> Attend:
    """Returns the causal attention of each sequence's new elements.

    It also stores their keys and values.

    The last layer computes only the last `num_outputs` elements of each sequence.
    """

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        queries_by_state = query.split([num_outputs] * len(states) if layer == last_layer else list(sizes))
        chunks = zip(states, queries_by_state, key.split(list(sizes)), value.split(list(sizes)), strict=True)
        for state, queries, keys, values in chunks:
            end = state.num_computed + len(keys)
            state.keys[layer, :, state.num_computed : end] = keys.transpose(0, 1)
            state.values[layer, :, state.num_computed : end] = values.transpose(0, 1)
            mask = None
            if len(queries) > 1:
                mask = queries.new_full((len(queries), end), MASKED).triu(end - len(queries) + 1)
            outputs.append(attention(queries, state.keys[layer, :, :end], state.values[layer, :, :end], mask))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return attend


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the attention output [Q, heads * d].

    `query` is [Q, heads, d], `keys` and `values` are [key heads, T, d], and `mask` is [Q, T] and additive.

    For the few queries of a draft, matrix products are faster than the CPU's fused kernel. For the many queries of a
    prompt they would need too much memory.
    """
    num_queries, heads, width = query.shape
    groups = keys.shape[0]
    if num_queries > MAX_BMM_QUERIES:
        batch = query.transpose(0, 1)[None], keys[None], values[None]
        fused = scaled_dot_product_attention(*batch, attn_mask=mask, enable_gqa=groups != heads)
        return fused[0].transpose(0, 1).reshape(num_queries, -1)
    scores = torch.bmm(
        (query * (1 / math.sqrt(width))).transpose(0, 1).reshape(groups, -1, width), keys.transpose(1, 2)
    )
    if mask is not None:
        scores.view(heads, num_queries, -1).add_(mask)
    mixed = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)
    return mixed.view(heads, num_queries, width).transpose(0, 1).reshape(num_queries, -1)
