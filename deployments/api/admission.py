"""Admission control: limits the running answers and the waiting requests."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from math import ceil
from types import MappingProxyType

MAX_RETRY_AFTER_S = 60
RUNNING_MEAN_WEIGHT = 0.1  # the weight of the newest request in the running mean


RATE_LIMIT_HEADERS = "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"
"""The headers with which OpenAI's API describes a limit."""


class Overloaded(RuntimeError):
    """Raised if the queue is full."""

    def __init__(self, retry_after_s: int, rate_limit_headers: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s
        self.headers = {"Retry-After": str(retry_after_s), **rate_limit_headers}


class AdmissionQueue:
    """A queue for slots, first come, first served. It belongs to one event loop."""

    def __init__(self, num_slots: int, max_queued_requests: int) -> None:
        self.num_slots, self.max_queued_requests = num_slots, max_queued_requests
        self.num_free_slots = num_slots
        # The number of requested slots, and an event that is set when they are granted.
        self._waiting: deque[tuple[int, asyncio.Event]] = deque()
        self._mean_service_s = 1.0  # mean seconds for which a request holds its slots
        self._idle, self._busy = asyncio.Event(), asyncio.Event()
        self._idle.set()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def expected_wait_s(self) -> float:
        """The seconds until the requests that wait now will have a slot."""
        return self._mean_service_s * len(self._waiting) / self.num_slots

    def rate_limit_headers(self) -> dict[str, str]:
        """Returns how many more requests this process would accept at the moment."""
        limit = self.num_slots + self.max_queued_requests
        remaining = max(0, self.num_free_slots) + self.max_queued_requests - len(self._waiting)
        return dict(zip(RATE_LIMIT_HEADERS, (str(limit), str(remaining), f"{self.expected_wait_s:.3f}s"), strict=True))

    async def wait_until_idle(self, seconds: float) -> None:
        """Returns when no slot has been held for this many seconds."""
        while True:
            await self._idle.wait()
            try:
                async with asyncio.timeout(seconds):
                    await self._busy.wait()
            except TimeoutError:
                return

    async def wait_until_busy(self) -> None:
        """Returns as soon as a slot is held."""
        await self._busy.wait()

    @asynccontextmanager
    async def hold_slots(self, count: int) -> AsyncIterator[None]:
        """Waits for `count` slots and holds them during the block."""
        await self._acquire(count)
        self._idle.clear()
        self._busy.set()
        started = time.monotonic()
        try:
            yield
        finally:
            self._mean_service_s += RUNNING_MEAN_WEIGHT * (time.monotonic() - started - self._mean_service_s)
            self._release(count)

    async def _acquire(self, count: int) -> None:
        if not self._waiting and count <= self.num_free_slots:
            self.num_free_slots -= count
            return
        if len(self._waiting) >= self.max_queued_requests:
            expected_wait_s = self._mean_service_s * (len(self._waiting) + 1) / self.num_slots
            retry_after_s = min(MAX_RETRY_AFTER_S, max(1, ceil(expected_wait_s)))
            raise Overloaded(retry_after_s, self.rate_limit_headers())
        admitted = asyncio.Event()
        entry = (count, admitted)
        self._waiting.append(entry)
        try:
            await admitted.wait()
        except asyncio.CancelledError:
            if admitted.is_set():  # admitted and cancelled at the same moment
                self._release(count)
            else:
                self._waiting.remove(entry)
                self._admit_waiting()
            raise

    def _release(self, count: int) -> None:
        self.num_free_slots += count
        self._admit_waiting()
        if self.num_free_slots == self.num_slots:
            self._busy.clear()
            self._idle.set()

    def _admit_waiting(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.num_free_slots:
            count, admitted = self._waiting.popleft()
            self.num_free_slots -= count
            admitted.set()
