"""Runs the forward pass of a step.

It packs the scheduled chunks, writes their keys and values, and samples tokens.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from parse.engines.native.attention import AttentionFactory
from parse.engines.native.cuda_graphs import CudaGraphs
from parse.engines.native.fair_lock import CPU_LOCK
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.sampler import SamplingState, sample
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.engines.native.scheduler import ScheduledRequest
from parse.errors import NumericalError
from parse.tree import MASK


@dataclass(frozen=True)
class ChunkOutput:
    """The part of a chunk's output that the program of its request reads."""

    logits: Tensor  # [entries, vocabulary], valid until the next step
    token_ids: list[int]  # the sampled token for each row of the logits


class ModelRunner:
    """Runs steps of one model on one KV cache."""

    def __init__(
        self, model: Model, kv_cache: KVCache, make_attention: AttentionFactory, cuda_graphs: CudaGraphs | None
    ) -> None:
        self.model, self.kv_cache, self.cuda_graphs = model, kv_cache, cuda_graphs
        self._make_attention = make_attention
        self.lock = CPU_LOCK if model.device.type == "cpu" else nullcontext()
        """Held while this engine computes, so that engines in one process take turns on the CPU."""
        self.num_steps = self.num_replayed_steps = self.num_tokens = 0

    def execute(self, scheduled: Sequence[ScheduledRequest]) -> list[ChunkOutput]:
        """Computes all chunks in one forward pass."""
        logits_entries: list[int] = []
        num_logits: list[int] = []  # of each chunk
        sampling_states: list[SamplingState | None] = []
        num_tokens = 0
        for request, chunk in ((each.request, each.chunk) for each in scheduled):
            offsets = _logits_offsets(request.tree_input.logits_nodes, chunk)
            logits_entries += [num_tokens + offset for offset in offsets]
            num_logits.append(len(offsets))
            num_tokens += len(chunk)
            first = len(request.sampled_token_ids)
            sampling_states += request.tree_input.sampling_states[first : first + len(offsets)] or [None] * len(offsets)
        chunks = [each.chunk for each in scheduled]
        logits = self._logits(chunks, None if len(logits_entries) == num_tokens else logits_entries)
        self.num_steps += 1
        self.num_tokens += num_tokens
        sampled = sample(logits, sampling_states)
        if -1 in sampled:
            tokens = [token for chunk in chunks for token in chunk.token_ids()]
            if any(token == -1 and tokens[entry] != MASK for token, entry in zip(sampled, logits_entries, strict=True)):
                raise NumericalError("the model returned logits that are not finite")
        return [
            ChunkOutput(logits[end - count : end], sampled[end - count : end])
            for count, end in zip(num_logits, accumulate(num_logits), strict=True)
        ]

    def move_to_context(self, sequence: SequenceState, path: Sequence[int]) -> None:
        """Moves the keys and values of a path into the context.

        They move to the slots right after those of the sequence's tokens.
        """
        length = len(sequence.token_ids)
        moves = [(length + node, length + depth) for depth, node in enumerate(path) if node != depth]
        if moves:
            sources, targets = zip(*moves, strict=True)
            self.kv_cache.move_slots(self._slots(sequence, sources), self._slots(sequence, targets))

    def aux_hidden_states(self, sequence: SequenceState, entries: Sequence[int]) -> Tensor:
        """Returns the hidden states [entries, width] of entries of the row.

        The row consists of the sequence's tokens, followed by the nodes.
        """
        hidden_states = self.kv_cache.aux_hidden_states
        assert hidden_states is not None, "the model has no `aux_hidden_state_layers`"
        return hidden_states[torch.tensor(self._slots(sequence, entries), device=hidden_states.device)]

    def _logits(self, chunks: Sequence[ScheduledChunk], logits_entries: Sequence[int] | None) -> Tensor:
        """Returns the logits [entries, vocabulary] of the step at these entries.

        If `logits_entries` is None, the logits of all entries are returned.
        """
        is_decode = logits_entries is None and all(len(chunk) == 1 and chunk.is_causal for chunk in chunks)
        use_graphs = is_decode and not self.model.aux_hidden_state_layers
        if use_graphs and self.cuda_graphs and (replayed := self.cuda_graphs.replay(chunks)) is not None:
            self.num_replayed_steps += 1
            return replayed
        tokens = [token for chunk in chunks for token in chunk.token_ids()]
        positions = [position for chunk in chunks for position in chunk.positions()]
        attention = self._make_attention(self.kv_cache, chunks)
        with self.lock:
            logits, hidden_states = self.model.forward(tokens, positions, attention, logits_entries)
        if hidden_states is not None:
            slots = [slot for chunk in chunks for slot in self._slots(chunk.sequence, range(chunk.start, chunk.end))]
            self.kv_cache.write_aux_hidden_states(slots, hidden_states)
        elif is_decode and self.cuda_graphs:
            self.cuda_graphs.record(chunks, logits)
        return logits

    def _slots(self, sequence: SequenceState, entries: Sequence[int]) -> list[int]:
        size = self.kv_cache.block_size
        return [sequence.block_ids[entry // size] * size + entry % size for entry in entries]


def _logits_offsets(logits_nodes: Sequence[int] | None, chunk: ScheduledChunk) -> list[int]:
    """Returns the offsets of a chunk's entries whose logits the program reads.

    Offsets count from the start of the chunk.
    """
    length = len(chunk.sequence.token_ids)
    nodes = range(len(chunk.tree)) if logits_nodes is None else logits_nodes
    return [length + node - chunk.start for node in nodes if chunk.start <= length + node < chunk.end]
