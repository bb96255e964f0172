"""A small model beside the target drafts a chain, token by token; it has to speak the same tokens.

It keeps keys and values of all texts, and of their common beginnings, as the engine does. What it has drafted and the
target accepted it need not read again.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from weakref import finalize

import torch
from torch import Tensor

from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Dtype, Model
from parse.engines.native.paged_attention import BLOCK_SIZE, attention_for
from parse.engines.native.prefix_cache import PrefixCache, SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.speculative.proposal import (
    NO_PROPOSAL,
    NOT_YET,
    MaskPrediction,
    Proposal,
    ProposalRequest,
    Proposer,
    chain_proposal,
)
from parse.speculative.proposers.eagle_head import ProposerLoadError

MAX_PREFILL_TOKENS = 512  # tokens at a time: long prompts must not stall everybody's next token
MAX_TOKENS_WITH_FIRST_STEP = 32  # tokens that are read with the first step of drafting, and not before it


class DraftModelProposer(Proposer["DraftModelState"]):
    def __init__(self, model: Model, vocab_size: int | None = None) -> None:
        """For a target of so many tokens, if not as many."""
        self.model, self.vocab_size = model, vocab_size or model.vocab_size
        self.bytes_per_token = model.bytes_per_token
        self._make_attention = attention_for(model.device)
        self._kv_cache: KVCache | None = None
        self._released: deque[SequenceState] = deque()  # by whichever thread lets go of a text
        self._reset_requested = False

    @classmethod
    def load(cls, path: str | Path, target: Model, *, device: str, dtype: Dtype) -> Self:
        model = Model.load(path, device=device, dtype=dtype)
        if model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
            raise ProposerLoadError(f"{path} does not speak the target's tokens: its tokenizer is another one")
        if model.vocab_size < (needed := max(target.tokenizer.get_vocab().values()) + 1):
            raise ProposerLoadError(f"{path} knows {model.vocab_size} tokens, the target's tokenizer {needed}")
        return cls(model, target.vocab_size)

    def reserve(self, max_sequences: int, sequence_capacity: int) -> None:
        """Memory for so many texts of so many tokens."""
        self.max_model_len = min(sequence_capacity, self.model.max_model_len)
        size = sequence_capacity if self.model.device.type == "cpu" else BLOCK_SIZE
        self._kv_cache = KVCache(max_sequences * sequence_capacity // size, size)
        self._prefix_cache = PrefixCache(self._kv_cache.num_blocks, size, self._kv_cache.copy_block)

    def reset(self) -> None:
        self._reset_requested = True

    def new_state(self) -> "DraftModelState":
        return DraftModelState()

    @torch.inference_mode()
    def propose(self, requests: Sequence[ProposalRequest["DraftModelState"]]) -> list[Proposal]:
        while self._released:
            self._prefix_cache.release(self._released.popleft())
        if self._reset_requested:
            self._reset_requested = False
            self._prefix_cache.reset()
        self._prefill_budget = MAX_PREFILL_TOKENS
        states = [wish.state for wish in requests]
        drafts: dict[DraftModelState, list[int]] = {}
        probabilities: dict[DraftModelState, list[float]] = {}
        active = {wish.state: wish for wish in requests if self._catch_up(wish.state)}
        while active := {text: wish for text, wish in active.items() if self._fits(text)}:
            for text, token, chance in self._step(list(active)):
                probability = chance * (probabilities[text][-1] if text in probabilities else 1.0)
                wish = active[text]
                if probability < wish.min_probability:
                    del active[text]
                    continue
                drafts.setdefault(text, []).append(token)
                probabilities.setdefault(text, []).append(probability)
                text.proposed.append(token)
                if len(drafts[text]) == min(wish.max_tokens, wish.max_depth):
                    del active[text]
        return [
            chain_proposal(drafts[text], probabilities[text])
            if text in drafts
            else NO_PROPOSAL
            if text.is_computed or not self._supports(text)
            else NOT_YET
            for text in states
        ]

    def _catch_up(self, state: "DraftModelState") -> bool:
        """Takes over what was drafted and accepted, and reads the rest but its last few tokens."""
        if not state.pending or not self._supports(state):
            return False
        if state.sequence is None:
            sequence = self._prefix_cache.allocate(state.pending[:-1], 1)
            if sequence is None:
                return False
            state.sequence, state.pending = sequence, state.pending[-1:]
            finalize(state, self._released.append, sequence)
        sequence = state.sequence
        num_reused = 0
        while (
            num_reused < min(state.num_proposed_computed, len(state.pending) - 1)
            and state.proposed[num_reused] == state.pending[num_reused]
        ):
            num_reused += 1
        if num_reused:
            self._prefix_cache.commit(sequence, state.pending[:num_reused])
            del state.pending[:num_reused]
        state.proposed, state.num_proposed_computed = [], 0
        if len(state.pending) > MAX_TOKENS_WITH_FIRST_STEP:
            sequence.token_ids += state.pending[:-1]
            del state.pending[:-1]
        num_uncomputed = len(sequence.token_ids) - sequence.num_computed_tokens
        if num_uncomputed > 0:
            count = min(num_uncomputed, self._prefill_budget)
            if not count or not self._prefix_cache.reserve(sequence, len(sequence.token_ids)):
                return False
            self._prefill_budget -= count
            self._forward(
                [ScheduledChunk(sequence, (), sequence.num_computed_tokens, sequence.num_computed_tokens + count)], []
            )
            sequence.num_computed_tokens += count
        return state.is_computed

    def _supports(self, state: "DraftModelState") -> bool:
        """A target may know more positions, and more tokens than its tokenizer has."""
        return state.length <= self.max_model_len and max(state.pending, default=0) < self.model.vocab_size

    def _fits(self, state: "DraftModelState") -> bool:
        assert state.sequence is not None
        length = len(state.sequence.token_ids) + len(state.pending) + len(state.proposed)
        return length <= self.max_model_len and self._prefix_cache.reserve(state.sequence, length)

    def _step(self, states: "Sequence[DraftModelState]") -> "list[tuple[DraftModelState, int, float]]":
        """One more token of each, and how likely it is."""
        chunks = []
        for text in states:
            sequence = text.sequence
            assert sequence is not None
            nodes = text.proposed or text.pending
            last = len(sequence.token_ids) + len(nodes)
            chunks.append(
                (text, ScheduledChunk(sequence, list(nodes), last - (1 if text.proposed else len(nodes)), last))
            )
        chunks.sort(
            key=lambda part: (len(part[1]), part[1].sequence.block_ids[0])
        )  # single tokens side by side in memory
        last_entries, size = [], 0
        for _, span in chunks:
            size += len(span)
            last_entries.append(size - 1)
        logits = self._forward([span for _, span in chunks], last_entries)[:, : self.vocab_size]
        probabilities, tokens = logits.softmax(-1).max(-1)
        for text, _ in chunks:
            assert text.sequence is not None
            if not text.proposed:  # what was new in the text is read now, all but the drafts belongs to it
                self._prefix_cache.commit(text.sequence, text.pending)
                text.pending = []
            else:
                text.num_proposed_computed = len(text.proposed)
        return [
            (text, token, chance)
            for (text, _), token, chance in zip(chunks, tokens.tolist(), probabilities.tolist(), strict=True)
        ]

    def _forward(self, chunks: Sequence[ScheduledChunk], logits_entries: Sequence[int]) -> Tensor:
        assert self._kv_cache is not None, "asked before memory was reserved"
        tokens = [token for span in chunks for token in span.token_ids()]
        positions = [position for span in chunks for position in span.positions()]
        logits, _ = self.model.forward(tokens, positions, self._make_attention(self._kv_cache, chunks), logits_entries)
        return logits


class DraftModelState:
    """The text of one request, as the small model has read it."""

    def __init__(self) -> None:
        self.sequence: SequenceState | None = None
        self.pending: list[int] = []  # tokens of the text behind the context
        self.proposed: list[int] = []
        self.num_proposed_computed = 0  # of them, those whose keys and values stand behind the context
        self.length = 0

    @property
    def is_computed(self) -> bool:
        """All but what is ahead?"""
        return self.sequence is not None and self.sequence.num_computed_tokens == len(self.sequence.token_ids)

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        self.pending += tokens
        self.length += len(tokens)
