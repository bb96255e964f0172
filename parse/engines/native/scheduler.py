"""Schedules the requests of an engine.

It decides which requests run, how many tokens of each the next step computes, and which request is preempted: the one
that was admitted last.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from parse.engines.native.prefix_cache import PrefixCache
from parse.engines.native.request import Request
from parse.engines.native.scheduled_chunk import ScheduledChunk


@dataclass(frozen=True)
class ScheduledRequest:
    request: Request
    chunk: ScheduledChunk


class Scheduler:
    """The queues of waiting and running requests.

    It also owns the blocks of their sequences.
    """

    def __init__(self, prefix_cache: PrefixCache, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.prefix_cache = prefix_cache
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def admit(self) -> Iterator[Request]:
        """Moves waiting requests to the running ones while there are free blocks.

        The order is first come, first served.

        A request that shares uncomputed tokens with a running one waits until these are computed. Later requests may
        overtake it. The caller starts each request before it takes the next one. If a request ends at once, the next
        one can use its blocks.
        """
        for request in list(self.waiting):
            if len(self.running) >= self.max_num_seqs:
                break
            if self.prefix_cache.is_being_computed(request.token_ids):
                continue
            sequence = self.prefix_cache.allocate(request.token_ids, len(request.tree_input.nodes))
            if sequence is None:
                break
            self.waiting.remove(request)
            self.running.append(request)
            request.sequence, request.num_computed = sequence, sequence.num_computed_tokens
            yield request

    def schedule(self) -> list[ScheduledRequest]:
        """Returns the chunks of the next step, after allocating blocks for all of them.

        Requests that need a single token come first and always run. They are in the order of their blocks, so that
        attention can batch neighbours. The other requests share the rest of the budget in the order of their admission.
        Causal chunks come before chunks of trees.
        """
        decodes = [request for request in self.running if request.num_uncomputed == 1]
        if len(decodes) > 1:
            decodes.sort(key=_first_block_id)
        budget = max(1, self.max_num_batched_tokens - len(decodes))
        scheduled = [_next_chunk(request, 1) for request in decodes]
        for request in self.running:
            if request.num_uncomputed > 1:
                if not budget:
                    break
                num_tokens = min(request.num_uncomputed, budget)
                budget -= num_tokens
                scheduled.append(_next_chunk(request, num_tokens))
        scheduled.sort(key=lambda each: not each.chunk.is_causal)
        for each in scheduled:
            while each.request.sequence is not None and not self.prefix_cache.reserve(
                each.chunk.sequence, each.chunk.end
            ):
                self.preempt(self.running[-1])
        return [each for each in scheduled if each.request.sequence is not None]

    def preempt(self, request: Request) -> None:
        """Takes the blocks of a running request, which continues later.

        The request moves to the front of the queue, with its committed tokens.
        """
        assert request.sequence is not None
        request.token_ids = list(request.sequence.token_ids)
        self.running.remove(request)
        self._release(request)
        request.num_computed, request.logits, request.sampled_token_ids = 0, [], []
        self.waiting.appendleft(request)

    def mark_computed(self, scheduled: ScheduledRequest) -> None:
        request, chunk = scheduled.request, scheduled.chunk
        request.num_computed = chunk.end
        chunk.sequence.num_computed_tokens = min(chunk.end, len(chunk.sequence.token_ids))

    def finish(self, request: Request) -> None:
        """Removes a request. The tokens that it has computed stay in the cache."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        if request.sequence is not None:
            self.prefix_cache.release(request.sequence)
            request.sequence = None


def _next_chunk(request: Request, num_tokens: int) -> ScheduledRequest:
    assert request.sequence is not None
    start = request.num_computed
    return ScheduledRequest(
        request, ScheduledChunk(request.sequence, request.tree_input.nodes, start, start + num_tokens)
    )


def _first_block_id(request: Request) -> int:
    assert request.sequence is not None
    return request.sequence.block_ids[0] if request.sequence.block_ids else 0  # no blocks before the first step
