"""The engine core: one thread that runs the steps of all requests."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from parse.device_errors import is_device_error
from parse.engines.native.attention import AttentionFactory
from parse.engines.native.cuda_graphs import cuda_graphs_for
from parse.engines.native.failed_step import smaller_steps
from parse.engines.native.generation import TreeInput, TreeOutput
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.model_runner import ChunkOutput, ModelRunner
from parse.engines.native.paged_attention import BLOCK_SIZE, PagedAttention, attention_for
from parse.engines.native.prefix_cache import PrefixCache
from parse.engines.native.request import Request
from parse.engines.native.scheduler import ScheduledRequest, Scheduler
from parse.engines.protocol import EngineStats
from parse.errors import EngineFailed, EngineStopped, RequestCancelled, RequestError
from parse.speculative.cost_model import StepCostModel
from parse.speculative.proposal import Proposal
from parse.speculative.proposal_policy import ProposalCall
from parse.tree import TokenTree

logger = logging.getLogger(__name__)

EMPTY_OUTPUT = TreeOutput(torch.empty(0), [])


@dataclass(frozen=True)
class EngineCoreConfig:
    """How many tokens an engine holds, and how many it computes at once.

    The KV cache holds `max_sequences * sequence_capacity` tokens. With `block_size=None`, a block on a CPU holds a
    whole sequence, so that its keys are contiguous. On other devices, and with an explicit block size, blocks are small
    and sequences take only as many as they need, so that more sequences fit.
    """

    max_sequences: int
    sequence_capacity: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int | None = None
    cuda_graphs: bool = False  # record steps of single tokens and replay them, where the device can do that


class EngineCore:
    """Serves one model. `add_request` and `abort` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        config: EngineCoreConfig,
        *,
        cost_model: StepCostModel | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread.

        `cost_model` receives the duration of each step without prefill or verification. `after_step` is called after
        each step that may have produced output.
        """
        self.model, self.cost_model = model, cost_model
        self._after_step = after_step
        make_attention: AttentionFactory = PagedAttention if config.block_size else attention_for(model.device)
        block_size = config.block_size or (config.sequence_capacity if model.device.type == "cpu" else BLOCK_SIZE)
        num_blocks = config.max_sequences * config.sequence_capacity // block_size
        self.max_sequence_length = min(config.sequence_capacity, num_blocks * block_size)
        # CUDA graphs need one more block, which no sequence gets.
        kv_cache = KVCache(num_blocks + config.cuda_graphs, block_size)
        cuda_graphs = (
            cuda_graphs_for(model, kv_cache, num_blocks, self.max_sequence_length) if config.cuda_graphs else None
        )
        self.model_runner = ModelRunner(model, kv_cache, make_attention, cuda_graphs)
        self.scheduler = Scheduler(
            PrefixCache(num_blocks, block_size, kv_cache.copy_block),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._num_step_requests = 0
        self._busy_s = 0.0
        self._num_output_tokens = 0  # tokens that programs have committed
        self._num_recorded_tokens = 0  # how many of them the cost model has seen
        self._proposal_calls: list[tuple[Request, ProposalCall]] = []
        self._stopped = self._reset_requested = False
        self._failure: str | None = None  # why the thread has ended, unless it was shut down
        self._thread = threading.Thread(target=self._run_loop, name=f"engine {model.name}", daemon=True)
        self._thread.start()

    def add_request(self, request: Request) -> Request:
        length = len(request.token_ids) + request.max_new_tokens
        if length > self.max_sequence_length:
            raise RequestError(
                "prompt",
                f"may grow to {length} tokens with its output, and the KV cache holds {self.max_sequence_length} for "
                "one request; shorten it or request fewer tokens",
            )
        if self._stopped:
            raise _end_error(self._failure)
        self._inbox.put(request)
        if self._stopped:  # the thread may have ended before it saw the request
            self._reject_pending()
        return request

    def abort(self, request: Request) -> None:
        """Cancels a request, which then ends within one step."""
        request.cancelled = True

    def reset_prefix_cache(self) -> None:
        """Discards all cached sequences.

        Sequences of running requests can still be shared.
        """
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
        num_waiting = len(self.scheduler.waiting) + self._inbox.qsize()
        return _stats(self.scheduler, self.model_runner, num_waiting, self._num_step_requests, self._busy_s)

    def _run_loop(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopped:
                    self._receive()
                    for request in self.scheduler.admit():
                        self._start(request)
                    began = time.perf_counter()
                    self._propose()
                    if scheduled := self.scheduler.schedule():
                        self._execute(scheduled)
                        self._num_step_requests += len(scheduled)
                        self._busy_s += time.perf_counter() - began
                    self._after_step()
        except BaseException as fault:
            logger.exception("the engine's thread failed; the engine serves no more requests")
            self._failure = repr(fault)
            self._stopped = True
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._finish(request, _end_error(self._failure))
        self._reject_pending()

    def _reject_pending(self) -> None:
        with suppress(queue.Empty):
            while True:
                if request := self._inbox.get_nowait():
                    self._finish(request, _end_error(self._failure))
        self._after_step()

    def _receive(self) -> None:
        """Takes new requests, and waits for one if there is nothing else to do."""
        while not self._inbox.empty() or not self.scheduler.has_requests:
            request = self._inbox.get()
            if request is None:  # another method only woke the thread
                break
            self.scheduler.add(request)
        if self._reset_requested:
            self._reset_requested = False
            self.scheduler.prefix_cache.reset()
        for request in [each for each in (*self.scheduler.waiting, *self.scheduler.running) if each.cancelled]:
            self._finish(request, RequestCancelled("the request was cancelled"))

    def _start(self, request: Request) -> None:
        """Starts the program of a request, or continues that of a preempted one."""
        if not request.started:
            request.started, request.num_cached_tokens = True, request.num_computed
            self._advance(request, None)
        elif not request.num_uncomputed:  # other requests have computed everything that it waits for
            self._advance(request, EMPTY_OUTPUT)

    def _propose(self) -> None:
        """Computes the proposals that programs wait for, one batch per method."""
        while self._proposal_calls:
            calls = [(request, call) for request, call in self._proposal_calls if request.sequence is not None]
            self._proposal_calls = []
            for method in {id(call.method): call.method for _, call in calls}.values():
                batch = [(request, call.request) for request, call in calls if call.method is method]
                with self.model_runner.lock:
                    proposals = method.propose([proposal_request for _, proposal_request in batch])
                for (request, _), proposal in zip(batch, proposals, strict=True):
                    self._advance(request, proposal)

    def _execute(self, scheduled: list[ScheduledRequest]) -> None:
        began = time.perf_counter()
        only_decodes = all(
            each.request.tree_input.logits_nodes is None and each.chunk.start >= len(each.chunk.sequence.token_ids)
            for each in scheduled
        )
        error: Exception | None = None
        try:
            outputs = self.model_runner.execute(scheduled)
        except Exception as fault:
            if is_device_error(fault):
                raise  # all later steps would fail, so the thread ends
            if not smaller_steps(scheduled, fault):
                logger.exception("a request failed in the model")
            error = fault.with_traceback(None)  # a traceback would keep the tensors of the failed step in memory
        if error is not None:
            self._retry(scheduled, error)
            return
        for each, output in zip(scheduled, outputs, strict=True):
            self.scheduler.mark_computed(each)
            self._process_output(each.request, output)
        if self.cost_model is not None and only_decodes:
            num_tokens = sum(len(each.chunk) for each in scheduled)
            num_output_tokens = self._num_output_tokens - self._num_recorded_tokens
            self.cost_model.record(len(scheduled), num_tokens, num_output_tokens, time.perf_counter() - began)
        self._num_recorded_tokens = self._num_output_tokens

    def _retry(self, scheduled: list[ScheduledRequest], error: Exception) -> None:
        """Runs a failed step in smaller parts, or ends the request that is at fault."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        steps = smaller_steps(scheduled, error)
        if not steps:
            self._finish(scheduled[0].request, error)
        for step in steps:
            if remaining := [each for each in step if each.request.sequence is each.chunk.sequence]:
                self._execute(remaining)

    def _process_output(self, request: Request, output: ChunkOutput) -> None:
        """Collects the output of a chunk; the last chunk of a tree advances the program."""
        assert request.sequence is not None
        if output.token_ids:
            # The next step may overwrite the logits.
            request.logits.append(output.logits.clone() if request.num_uncomputed else output.logits)
            request.sampled_token_ids += output.token_ids
        if not request.num_uncomputed:
            parts = request.logits or [output.logits]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            hidden_states = partial(self.model_runner.aux_hidden_states, request.sequence)
            self._advance(request, TreeOutput(logits, request.sampled_token_ids, hidden_states))

    def _advance(self, request: Request, output: TreeOutput | Proposal | None) -> None:
        """Sends an output to the program, or None to start it; takes its next input."""
        try:
            tree_input = request.program.send(output)
            if isinstance(tree_input, ProposalCall):
                self._proposal_calls.append((request, tree_input))
                return
            self._set_tree_input(request, tree_input)
        except StopIteration:
            self._finish(request, None)
            return
        except Exception as error:
            logger.exception("the program of a request failed")
            self._finish(request, error)
            return
        if request.num_entries > self.max_sequence_length:
            message = (
                f"needs more than the {self.max_sequence_length} tokens that the KV cache holds for one request; "
                "shorten it or request fewer tokens"
            )
            self._finish(request, RequestError("prompt", message))
        elif not request.num_uncomputed:
            self._advance(request, EMPTY_OUTPUT)

    def _set_tree_input(self, request: Request, tree_input: TreeInput) -> None:
        """Commits the accepted path of the last tree and sets the next tree.

        If the input requests it, the context is truncated in between.
        """
        sequence, nodes = request.sequence, request.tree_input.nodes
        assert sequence is not None
        path = tree_input.accepted_path if len(nodes) else ()  # the first input follows no tree
        if path:
            token_ids = nodes.tokens if isinstance(nodes, TokenTree) else nodes
            self.model_runner.move_to_context(sequence, path)
            self.scheduler.prefix_cache.commit(sequence, [int(token_ids[node]) for node in path])
            self._num_output_tokens += len(path)
        if tree_input.context_length is not None:
            if tree_input.context_length > len(sequence.token_ids):
                raise ValueError(
                    f"a context of {len(sequence.token_ids)} tokens cannot be truncated to {tree_input.context_length}"
                )
            self.scheduler.prefix_cache.truncate(sequence, tree_input.context_length)
        request.tree_input, request.num_computed = tree_input, sequence.num_computed_tokens
        request.logits, request.sampled_token_ids = [], []

    def _finish(self, request: Request, error: BaseException | None) -> None:
        self.scheduler.finish(request)
        request.program.close()
        request.listener.on_finished(error)


def _stats(
    scheduler: Scheduler, runner: ModelRunner, num_waiting: int, num_step_requests: int, busy_s: float
) -> EngineStats:
    cache = scheduler.prefix_cache
    return EngineStats(
        num_running=len(scheduler.running),
        num_waiting=num_waiting,
        num_steps=runner.num_steps,
        num_step_requests=num_step_requests,
        busy_s=busy_s,
        num_tokens=runner.num_tokens,
        prefix_queries=cache.lookups,
        prefix_hits=cache.hits,
        evictions=cache.evictions,
        blocks_used=cache.num_blocks - cache.num_free_blocks,
        blocks_cached=cache.num_cached_blocks,
        blocks_total=cache.num_blocks,
        num_replayed_steps=runner.num_replayed_steps,
    )


def _end_error(failure: str | None) -> EngineStopped:
    """Returns the error of a request that the thread no longer serves."""
    if failure is None:
        return EngineStopped("the engine was shut down")
    return EngineFailed(f"the engine's thread failed: {failure}")
