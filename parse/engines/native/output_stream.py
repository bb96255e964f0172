"""Passes results from the engine's thread to the coroutines that wait for them.

It does not look at them. `generate` in `parse/engines/native/generation.py` ends a text, also at a stop string.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from parse.types import TokenDelta, VerifyResult, merge_deltas

WAKE_INTERVAL_S = 0.02  # people do not read faster than this


class Waker:
    """Wakes the coroutines that wait for one engine, all of them at once.

    Waking an event loop takes a large part of the time of a small model's step. The engine's thread therefore does it
    between steps, at most every `WAKE_INTERVAL_S` unless a result is urgent.
    """

    def __init__(self) -> None:
        self._waiting: deque[OutputStream] = deque()
        self._urgent = False
        self._last_wake = 0.0

    def add(self, stream: "OutputStream", *, urgent: bool) -> None:
        self._waiting.append(stream)
        if urgent:
            self._urgent = True

    def set_urgent(self) -> None:
        self._urgent = True

    def wake(self) -> None:
        if not self._waiting or not (self._urgent or time.monotonic() - self._last_wake >= WAKE_INTERVAL_S):
            return
        self._urgent, self._last_wake = False, time.monotonic()
        streams_by_loop: dict[asyncio.AbstractEventLoop, list[OutputStream]] = {}
        with suppress(IndexError):
            while True:
                stream = self._waiting.popleft()
                streams_by_loop.setdefault(stream.loop, []).append(stream)
        for loop, streams in streams_by_loop.items():
            with suppress(RuntimeError):  # the loop is closed, so no coroutine waits in it
                loop.call_soon_threadsafe(_notify_all, streams)


def _notify_all(streams: "Sequence[OutputStream]") -> None:
    for stream in streams:
        stream.notify()


class OutputStream:
    """Passes the results of one request from the engine's thread to a coroutine.

    The coroutine merges pending deltas into one.

    These results are urgent: the first one, the one after a verification, and the end. With `patient=False` all results
    are urgent.
    """

    def __init__(self, waker: Waker, *, patient: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self._waker, self._urgent, self._patient = waker, True, patient
        self._results: deque[VerifyResult | TokenDelta] = deque()
        self._changed = asyncio.Event()
        self._is_waiting = self._finished = False
        self._error: BaseException | None = None

    def put(self, result: VerifyResult | TokenDelta) -> None:
        self._results.append(result)
        self._request_wake()
        self._urgent = not self._patient or isinstance(result, VerifyResult)

    def on_finished(self, error: BaseException | None) -> None:
        self._error, self._finished, self._urgent = error, True, True
        self._request_wake()

    def _request_wake(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self._waker.add(self, urgent=self._urgent)
        elif self._urgent:
            self._waker.set_urgent()

    def notify(self) -> None:
        self._is_waiting = False
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[VerifyResult | TokenDelta]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            finished = self._finished
            deltas: list[TokenDelta] = []
            while self._results:
                result = self._results.popleft()
                if isinstance(result, VerifyResult):  # always the first result of a request
                    yield result
                else:
                    deltas.append(result)
            if deltas:
                yield merge_deltas(deltas)
            if finished:
                if self._error is not None:
                    raise self._error
                return
