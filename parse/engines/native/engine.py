"""The engine: one thread that packs what all requests ask for into one forward pass after another."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from parse.engines.native.attention import AttentionFactory
from parse.engines.native.cuda_graphs import cuda_graphs_for
from parse.engines.native.fair_lock import CPU_LOCK
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import BLOCK_SIZE, PagedAttention, attention_for
from parse.engines.native.prefix_cache import PrefixCache, SequenceState
from parse.engines.native.programs import Program, TreeInput, TreeOutput
from parse.engines.native.sampler import SamplingState, sample
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.speculative.cost_model import StepCostModel
from parse.speculative.policy import ProposalCall
from parse.speculative.proposal import Proposal
from parse.tree import MASK, TokenTree
from parse.types import EngineStopped, NumericalError, RequestCancelled, RequestError

logger = logging.getLogger(__name__)

EMPTY_OUTPUT = TreeOutput(torch.empty(0), [])


class RequestListener(Protocol):
    """Told of a job's end, from the engine's thread."""

    def on_finished(self, error: BaseException | None) -> None: ...


@dataclass(eq=False)
class Request:
    """A request on its way: its program, and how far the row of its context and asked nodes is computed."""

    token_ids: list[int]  # of the context it starts with, or goes on with when it was set back
    program: Program
    max_new_tokens: int  # tokens it may add
    listener: RequestListener
    sequence: SequenceState | None = None
    started: bool = False
    num_cached_tokens: int = 0  # tokens that were found computed when it began
    tree_input: TreeInput = field(default_factory=lambda: TreeInput((), ()))
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # a token at each of what the answers hold
    cancelled: bool = False

    @property
    def num_uncomputed(self) -> int:
        assert self.sequence is not None
        return len(self.sequence.token_ids) + len(self.tree_input.nodes) - self.num_computed


@dataclass(frozen=True)
class EngineStats:
    """What the engine does at this moment, and has done since its start."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_step_requests: int  # requests in them, added up: over the steps, the mean batch
    busy_s: float  # spent in them
    num_tokens: int  # computed
    prefix_queries: int  # looked for in the cache
    prefix_hits: int  # and found there
    evictions: int
    blocks_used: int
    blocks_cached: int  # of them, those that are kept only because somebody may come with the same beginning
    blocks_total: int
    num_replayed_steps: int = 0  # of the steps


class EngineCore:
    """Serves one model. `submit` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int,
        sequence_capacity: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        block_size: int | None = None,
        cuda_graphs: bool = False,
        cost_model: StepCostModel | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Memory for `contexts` rows of `capacity` tokens; at most `step_tokens` are computed in one pass.

        On a CPU a row lies in one piece. On other devices, or given a `page_size`, rows lie in small pages and take no
        more of them than they need, so that there may be more rows.

        With `graphs`, steps of single tokens are recorded and replayed where the device can do that. `costs` are told
        what passes take.
        """
        self.model, self.max_num_seqs, self.max_num_batched_tokens, self.cost_model = (
            model,
            max_num_seqs,
            max_num_batched_tokens,
            cost_model,
        )
        self._after_step = after_step  # called whenever listeners may have been told something
        self._make_attention: AttentionFactory
        if block_size is None:
            block_size = sequence_capacity if model.device.type == "cpu" else BLOCK_SIZE
            self._make_attention = attention_for(model.device)
        else:
            self._make_attention = PagedAttention
        num_blocks = max_sequences * sequence_capacity // block_size
        self._lock = CPU_LOCK if model.device.type == "cpu" else nullcontext()
        self.block_size = block_size
        self.max_sequence_length = min(sequence_capacity, num_blocks * block_size)
        self._kv_cache = KVCache(num_blocks + cuda_graphs, block_size)  # one that is nobody's
        self._cuda_graphs = (
            cuda_graphs_for(model, self._kv_cache, num_blocks, self.max_sequence_length) if cuda_graphs else None
        )
        self._prefix_cache = PrefixCache(num_blocks, block_size, self._kv_cache.copy_block)
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._num_steps = self._num_step_requests = self._num_tokens = self._num_replayed_steps = 0
        self._busy_s = 0.0
        self._num_output_tokens = self._num_recorded_tokens = (
            0  # tokens that were kept, and how many of them the costs know
        )
        self._proposal_calls: list[tuple[Request, ProposalCall]] = []
        self._stopped = self._reset_requested = False
        self._thread = threading.Thread(target=self._run_loop, name=f"engine {model.name}", daemon=True)
        self._thread.start()

    def add_request(self, request: Request) -> Request:
        if len(request.token_ids) + request.max_new_tokens > self.max_sequence_length:
            message = (
                f"takes memory for {len(request.token_ids) + request.max_new_tokens} tokens with what may follow it"
            )
            raise RequestError("prompt", f"{message}, the limit is {self.max_sequence_length}")
        if self._stopped:
            raise EngineStopped("the engine was shut down")
        self._inbox.put(request)
        if self._stopped:  # it may have come too late to be seen
            self._reject_pending()
        return request

    def abort(self, request: Request) -> None:
        """Its work ends within a step."""
        request.cancelled = True

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far serves later requests."""
        self._reset_requested = True
        self._inbox.put(None)

    def shutdown(self) -> None:
        """Ends all requests and the thread."""
        self._stopped = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return not self._stopped and self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        cache = self._prefix_cache
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + self._inbox.qsize(),
            num_steps=self._num_steps,
            num_step_requests=self._num_step_requests,
            busy_s=self._busy_s,
            num_tokens=self._num_tokens,
            prefix_queries=cache.lookups,
            prefix_hits=cache.hits,
            evictions=cache.evictions,
            blocks_used=cache.num_blocks - cache.num_free_blocks,
            blocks_cached=cache.num_cached_blocks,
            blocks_total=cache.num_blocks,
            num_replayed_steps=self._num_replayed_steps,
        )

    def _run_loop(self) -> None:
        error = EngineStopped("the engine was shut down")
        try:
            with torch.inference_mode():
                while not self._stopped:
                    self._receive()
                    self._admit()
                    began = time.perf_counter()
                    self._propose()
                    if plan := self._granted(self._plan()):
                        self._execute(plan)
                        self._num_step_requests += len(plan)
                        self._busy_s += time.perf_counter() - began
                    self._after_step()
        except BaseException as fault:
            logger.exception("the engine's thread died")
            self._stopped = True
            error = EngineStopped(f"the engine broke down: {fault!r}")
        for request in [*self._running, *self._waiting]:
            self._finish_request(request, error)
        self._reject_pending()

    def _reject_pending(self) -> None:
        with suppress(queue.Empty):
            while True:
                if request := self._inbox.get_nowait():
                    self._finish_request(request, EngineStopped("the engine was shut down"))
        self._after_step()

    def _receive(self) -> None:
        """New requests; waits for one if there is nothing else to do."""
        while not self._inbox.empty() or not (self._running or self._waiting):
            arrived = self._inbox.get()
            if arrived is None:  # only to be woken
                break
            self._waiting.append(arrived)
        if self._reset_requested:
            self._reset_requested = False
            self._prefix_cache.reset()
        for request in [job for job in (*self._waiting, *self._running) if job.cancelled]:
            self._finish_request(request, RequestCancelled("the request was cancelled"))

    def _admit(self) -> None:
        """First come, first served, but who could share what is being computed now waits for that."""
        for job in list(self._waiting):
            if len(self._running) >= self.max_num_seqs:
                break
            if self._prefix_cache.is_being_computed(job.token_ids):
                continue
            context = self._prefix_cache.allocate(job.token_ids, len(job.tree_input.nodes))
            if context is None:
                break
            self._waiting.remove(job)
            self._running.append(job)
            job.sequence, job.num_computed = context, context.num_computed_tokens
            if not job.started:
                job.started, job.num_cached_tokens = True, context.num_computed_tokens
                self._advance(job, None)
            elif not job.num_uncomputed:  # while it was set back, others have computed all it wanted
                self._advance(job, EMPTY_OUTPUT)

    def _propose(self) -> None:
        """What programs wish to have foreseen, for all of them at once."""
        while self._proposal_calls:
            wishes = [(job, wished) for job, wished in self._proposal_calls if job.sequence is not None]
            self._proposal_calls = []
            for way in {id(wished.method): wished.method for _, wished in wishes}.values():
                asking = [(job, wished.request) for job, wished in wishes if wished.method is way]
                proposals = way.propose([wish for _, wish in asking])
                for (job, _), proposal in zip(asking, proposals, strict=True):
                    self._advance(job, proposal)

    def _plan(self) -> list[tuple[Request, ScheduledChunk]]:
        """Requests that need a single token first, in the order of their pages; the rest shares what is left."""
        singles = [job for job in self._running if job.num_uncomputed == 1]
        if len(singles) > 1:
            singles.sort(key=_first_block)
        budget = max(1, self.max_num_batched_tokens - len(singles))
        plan = [self._span(job, 1) for job in singles]
        for job in self._running:
            if job.num_uncomputed > 1:
                if not budget:
                    break
                count = min(job.num_uncomputed, budget)
                budget -= count
                plan.append(self._span(job, count))
        plan.sort(key=lambda part: not part[1].is_causal)  # texts first, trees last
        return plan

    def _granted(self, plan: list[tuple[Request, ScheduledChunk]]) -> list[tuple[Request, ScheduledChunk]]:
        """What of the plan there is memory for; where it falls short, the youngest give theirs up."""
        for job, span in plan:
            if span.end > self.max_sequence_length:
                self._finish_request(
                    job, RequestError("prompt", f"with what follows it outgrew {self.max_sequence_length} tokens")
                )
            while job.sequence is not None and not self._prefix_cache.reserve(job.sequence, span.end):
                self._preempt(self._running[-1])
        return [(job, span) for job, span in plan if job.sequence is span.sequence]

    def _preempt(self, job: Request) -> None:
        """It waits again, before all others, with what it has committed and what it asked last."""
        assert job.sequence is not None
        job.token_ids = list(job.sequence.token_ids)
        self._prefix_cache.release(job.sequence)
        job.sequence, job.num_computed, job.logits, job.sampled = None, 0, [], []
        self._running.remove(job)
        self._waiting.appendleft(job)

    @staticmethod
    def _span(job: Request, count: int) -> tuple[Request, ScheduledChunk]:
        assert job.sequence is not None
        return job, ScheduledChunk(job.sequence, job.tree_input.nodes, job.num_computed, job.num_computed + count)

    def _execute(self, plan: list[tuple[Request, ScheduledChunk]]) -> None:
        writing = all(
            job.tree_input.logits_nodes is None and span.start >= len(span.sequence.token_ids) for job, span in plan
        )
        began = time.perf_counter()
        try:
            chosen, logits, reads = self._forward(plan)
        except Exception as error:
            if len(plan) == 1:
                logger.exception("a request failed in the model")
                self._finish_request(plan[0][0], error)
                return
            for part in plan:  # whoever is at fault fails alone
                self._execute([part])
            return
        for (job, span), (first, last) in zip(plan, reads, strict=True):
            assert job.sequence is not None
            job.num_computed = span.end
            job.sequence.num_computed_tokens = min(span.end, len(job.sequence.token_ids))
            if last > first:
                answer = logits[first:last]
                job.logits.append(answer.clone() if job.num_uncomputed else answer)  # the next step may write there
                job.sampled += chosen[first:last]
            if not job.num_uncomputed:
                answers = job.logits or [logits[:0]]
                whole = answers[0] if len(answers) == 1 else torch.cat(answers)
                self._advance(job, TreeOutput(whole, job.sampled, partial(self._aux_hidden_states, job.sequence)))
        if self.cost_model is not None and writing:
            entries, tokens = sum(len(span) for _, span in plan), self._num_output_tokens - self._num_recorded_tokens
            self.cost_model.record(len(plan), entries, tokens, time.perf_counter() - began)
        self._num_recorded_tokens = self._num_output_tokens

    def _forward(
        self, plan: Sequence[tuple[Request, ScheduledChunk]]
    ) -> tuple[list[int], Tensor, list[tuple[int, int]]]:
        """The tokens chosen and the logits at the wanted places of all spans, and where in them each span's lie."""
        read: list[int] = []
        reads: list[tuple[int, int]] = []
        draws: list[SamplingState | None] = []
        size = 0
        for job, span in plan:
            places = _logits_entries(job, span)
            reads.append((len(read), len(read) + len(places)))
            read += [size + place for place in places]
            size += len(span)
            known = len(job.sampled)
            draws += job.tree_input.sampling[known : known + len(places)] or [None] * len(places)
        logits = self._logits([span for _, span in plan], None if len(read) == size else read)
        self._num_steps += 1
        self._num_tokens += size
        chosen = sample(logits, draws)
        if -1 in chosen:
            tokens = [token for _, span in plan for token in span.token_ids()]
            if any(token == -1 and tokens[entry] != MASK for token, entry in zip(chosen, read, strict=True)):
                raise NumericalError("the model returned logits that are not finite")
        return chosen, logits, reads

    def _logits(self, spans: Sequence[ScheduledChunk], read: Sequence[int] | None) -> Tensor:
        """[entries, vocabulary], at the entries in `read`, or all."""
        alike = read is None and all(len(span) == 1 and span.is_causal for span in spans)
        if (
            alike
            and self._cuda_graphs
            and not self.model.aux_hidden_state_layers
            and (known := self._cuda_graphs.replay(spans)) is not None
        ):
            self._num_replayed_steps += 1
            return known
        tokens = [token for span in spans for token in span.token_ids()]
        positions = [position for span in spans for position in span.positions()]
        attention = self._make_attention(self._kv_cache, spans)
        with self._lock:
            logits, features = self.model.forward(tokens, positions, attention, read)
        if features is not None:
            at = [slot for span in spans for slot in self._slots(span.sequence, range(span.start, span.end))]
            self._kv_cache.write_aux_hidden_states(at, features)
        elif alike and self._cuda_graphs:
            self._cuda_graphs.record(spans, logits)
        return logits

    def _advance(self, job: Request, said: TreeOutput | Proposal | None) -> None:
        """Lets the program decide on what it asked for (None: start it), and takes what it asks next."""
        try:
            asked = job.program.send(said)
        except StopIteration:
            self._finish_request(job, None)
            return
        except Exception as error:
            logger.exception("a request failed on its answer")
            self._finish_request(job, error)
            return
        if isinstance(asked, ProposalCall):
            self._proposal_calls.append((job, asked))
            return
        context, nodes, job.tree_input = job.sequence, job.tree_input.nodes, asked
        assert context is not None
        if asked.accepted_path and len(nodes):  # a first ask has none before it
            self._commit(context, nodes, asked.accepted_path)
        if asked.context_length is not None:
            self._prefix_cache.truncate(context, asked.context_length)
        job.num_computed = context.num_computed_tokens
        job.logits, job.sampled = [], []
        if not job.num_uncomputed:
            self._advance(job, EMPTY_OUTPUT)

    def _commit(self, context: SequenceState, nodes: TokenTree | Sequence[int], path: Sequence[int]) -> None:
        """Keys and values of the path close up behind the context: what stood between them is given up."""
        known = len(context.token_ids)
        moves = [(known + node, known + place) for place, node in enumerate(path) if node != place]
        if moves:
            sources, targets = zip(*moves, strict=True)
            self._kv_cache.move_slots(self._slots(context, sources), self._slots(context, targets))
        tokens = nodes.tokens if isinstance(nodes, TokenTree) else nodes
        self._prefix_cache.commit(context, [int(tokens[node]) for node in path])
        self._num_output_tokens += len(path)

    def _slots(self, context: SequenceState, entries: Sequence[int]) -> list[int]:
        size = self._prefix_cache.block_size
        return [context.block_ids[entry // size] * size + entry % size for entry in entries]

    def _aux_hidden_states(self, context: SequenceState, entries: Sequence[int]) -> Tensor:
        """[entries, width], of the row: the context and the nodes behind it."""
        features = self._kv_cache.aux_hidden_states
        assert features is not None, "asked of a model without taps"
        return features[torch.tensor(self._slots(context, entries), device=features.device)]

    def _finish_request(self, job: Request, error: BaseException | None) -> None:
        if job in self._running:
            self._running.remove(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        if job.sequence is not None:
            self._prefix_cache.release(job.sequence)
            job.sequence = None
        job.program.close()
        job.listener.on_finished(error)


def _first_block(job: Request) -> int:
    assert job.sequence is not None
    return job.sequence.block_ids[0] if job.sequence.block_ids else 0  # none yet: nothing is computed


def _logits_entries(job: Request, span: ScheduledChunk) -> list[int]:
    """Which entries of the span the program wants the logits of."""
    known = len(span.sequence.token_ids)
    read = range(len(job.tree_input.nodes)) if job.tree_input.logits_nodes is None else job.tree_input.logits_nodes
    return [known + node - span.start for node in read if span.start <= known + node < span.end]
