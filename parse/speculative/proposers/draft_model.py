"""A small model with the target's tokenizer proposes a chain, token by token.

Like the engine, it has a KV cache and a prefix cache. Tokens that it proposed and the target accepted are already in
that cache, so they are not computed again.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from weakref import finalize

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parse.config import SpeculativeConfig
from parse.engines.native.checkpoint import Dtype
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import BLOCK_SIZE, attention_for
from parse.engines.native.prefix_cache import PrefixCache, SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.speculative.proposal import (
    NO_PROPOSAL,
    NOT_READY,
    MaskPrediction,
    Proposal,
    ProposalRequest,
    Proposer,
    chain_proposal,
)
from parse.speculative.proposers.base import DEFAULT_CHAIN_LENGTH, LoadContext, LoadedProposer, ProposerLoadError

MAX_PREFILL_TOKENS = 512  # tokens in one call, so that a long prompt does not delay the other sequences
MAX_TOKENS_WITH_FIRST_STEP = 32  # up to this many pending tokens are computed in the first drafting step


def load(config: SpeculativeConfig, load_context: LoadContext) -> LoadedProposer:
    """Loads the small model onto the target's device."""
    assert config.model is not None, "the settings require a model"
    proposer = DraftModelProposer.load(
        config.model,
        load_context.tokenizer,
        vocab_size=load_context.vocab_size,
        device=load_context.device,
        dtype=load_context.dtype,
    )
    return LoadedProposer(proposer, config.num_speculative_tokens or DEFAULT_CHAIN_LENGTH)


def check_same_tokenizer(
    path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, target_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ProposerLoadError if a small model does not read and write all tokens of the target's tokenizer."""
    if tokenizer.get_vocab() != target_tokenizer.get_vocab():
        raise ProposerLoadError(f"{path} has a different tokenizer than the target")
    if vocab_size < (needed := max(target_tokenizer.get_vocab().values()) + 1):
        raise ProposerLoadError(f"{path} has {vocab_size} tokens, and the target's tokenizer has {needed}")


class DraftModelProposer(Proposer["DraftModelState"]):
    """Proposes for all requests of a call in the same passes of the small model."""

    def __init__(self, model: Model, vocab_size: int | None = None) -> None:
        """Proposes only token ids below `vocab_size`.

        The target's vocabulary may be smaller than that of the small model. None means all tokens of the small model's
        vocabulary.
        """
        self.model, self.vocab_size = model, vocab_size or model.vocab_size
        self.bytes_per_token = model.bytes_per_token
        self._make_attention = attention_for(model.device)
        self._kv_cache: KVCache | None = None
        # Sequences whose state was deleted. Any thread may delete one, but only `propose` uses the prefix cache.
        self._released: deque[SequenceState] = deque()
        self._reset_requested = False

    @classmethod
    def load(
        cls, path: str | Path, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, device: str, dtype: Dtype
    ) -> Self:
        """Loads a small model for a target with this tokenizer and this size of its vocabulary."""
        model = Model.load(path, device=device, dtype=dtype)
        check_same_tokenizer(str(path), model.tokenizer, model.vocab_size, tokenizer)
        return cls(model, vocab_size)

    def reserve(self, max_sequences: int, sequence_capacity: int) -> None:
        self.max_model_len = min(sequence_capacity, self.model.max_model_len)
        block_size = sequence_capacity if self.model.device.type == "cpu" else BLOCK_SIZE
        self._kv_cache = KVCache(max_sequences * sequence_capacity // block_size, block_size)
        self._prefix_cache = PrefixCache(self._kv_cache.num_blocks, block_size, self._kv_cache.copy_block)

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
        states = [request.state for request in requests]
        drafts: dict[DraftModelState, list[int]] = {}
        probabilities: dict[DraftModelState, list[float]] = {}
        active = {request.state: request for request in requests if self._catch_up(request.state)}
        while active := {state: request for state, request in active.items() if self._fits(state)}:
            for state, token, token_probability in self._step(list(active)):
                path_probability = token_probability * (probabilities[state][-1] if state in probabilities else 1.0)
                request = active[state]
                if path_probability < request.min_probability:
                    del active[state]
                    continue
                drafts.setdefault(state, []).append(token)
                probabilities.setdefault(state, []).append(path_probability)
                state.proposed.append(token)
                if len(drafts[state]) == min(request.max_tokens, request.max_depth):
                    del active[state]
        return [
            chain_proposal(drafts[state], probabilities[state])
            if state in drafts
            else NO_PROPOSAL
            if state.is_computed or not self._supports(state)
            else NOT_READY
            for state in states
        ]

    def _catch_up(self, state: "DraftModelState") -> bool:
        """Keeps the accepted tokens, and computes most of the other new tokens.

        Returns whether the rest is short enough to be computed with the first drafting step.
        """
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
            start = sequence.num_computed_tokens
            self._forward([ScheduledChunk(sequence, (), start, start + count)], [])
            sequence.num_computed_tokens += count
        return state.is_computed

    def _supports(self, state: "DraftModelState") -> bool:
        """Returns whether the small model has all positions and tokens of a sequence.

        The target may have more of both.
        """
        return state.length <= self.max_model_len and max(state.pending, default=0) < self.model.vocab_size

    def _fits(self, state: "DraftModelState") -> bool:
        """Returns whether the sequence can be extended by a token."""
        assert state.sequence is not None
        length = len(state.sequence.token_ids) + len(state.pending) + len(state.proposed)
        return length <= self.max_model_len and self._prefix_cache.reserve(state.sequence, length)

    def _step(self, states: "Sequence[DraftModelState]") -> "list[tuple[DraftModelState, int, float]]":
        """Proposes one token for each state; returns the tokens and their probabilities."""
        chunks = []
        for state in states:
            sequence = state.sequence
            assert sequence is not None
            nodes = state.proposed or state.pending
            end = len(sequence.token_ids) + len(nodes)
            start = end - (1 if state.proposed else len(nodes))
            chunks.append((state, ScheduledChunk(sequence, list(nodes), start, end)))
        # Attention is faster if chunks of one token come first, in the order of their blocks in memory.
        chunks.sort(key=lambda part: (len(part[1]), part[1].sequence.block_ids[0]))
        logits_entries, num_entries = [], 0
        for _, chunk in chunks:
            num_entries += len(chunk)
            logits_entries.append(num_entries - 1)
        logits = self._forward([chunk for _, chunk in chunks], logits_entries)[:, : self.vocab_size]
        probabilities, tokens = logits.softmax(-1).max(-1)
        for state, _ in chunks:
            assert state.sequence is not None
            if not state.proposed:  # this step has computed the new tokens of the sequence
                self._prefix_cache.commit(state.sequence, state.pending)
                state.pending = []
            else:
                state.num_proposed_computed = len(state.proposed)
        return [
            (state, token, probability)
            for (state, _), token, probability in zip(chunks, tokens.tolist(), probabilities.tolist(), strict=True)
        ]

    def _forward(self, chunks: Sequence[ScheduledChunk], logits_entries: Sequence[int]) -> Tensor:
        assert self._kv_cache is not None, "`reserve` must be called first"
        tokens = [token for chunk in chunks for token in chunk.token_ids()]
        positions = [position for chunk in chunks for position in chunk.positions()]
        logits, _ = self.model.forward(tokens, positions, self._make_attention(self._kv_cache, chunks), logits_entries)
        return logits


class DraftModelState:
    """State of one sequence in the small model."""

    def __init__(self) -> None:
        self.sequence: SequenceState | None = None
        self.pending: list[int] = []  # tokens that follow those of `sequence`
        self.proposed: list[int] = []  # tokens proposed after `sequence` in the last call
        self.num_proposed_computed = 0  # proposed tokens whose keys and values are stored after the sequence's
        self.length = 0

    @property
    def is_computed(self) -> bool:
        """Whether all tokens except the pending ones are in the cache."""
        return self.sequence is not None and self.sequence.num_computed_tokens == len(self.sequence.token_ids)

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        self.pending += tokens
        self.length += len(tokens)
