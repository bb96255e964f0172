"""How many answers are worked on at the same time, and how many requests may wait for that."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import ceil

LONGEST_RETRY_S = 60
WEIGHT = 0.1  # of the newest request in the running mean


class Overloaded(RuntimeError):
    """Too many are waiting already."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Gate:
    """First come, first served. Belongs to one event loop."""

    def __init__(self, places: int, waiting: int) -> None:
        self.places, self.most_waiting = places, waiting
        self.free = places
        self._line: deque[tuple[int, asyncio.Event]] = deque()  # places wanted; is it let in?
        self._mean_s = 1.0  # a request's time inside
        self._rests, self._wanted = asyncio.Event(), asyncio.Event()
        self._rests.set()

    @property
    def waiting(self) -> int:
        return len(self._line)

    async def rests(self, seconds: float) -> None:
        """Comes back when nobody has been inside for that long."""
        while True:
            await self._rests.wait()
            try:
                async with asyncio.timeout(seconds):
                    await self._wanted.wait()
            except TimeoutError:
                return

    async def is_wanted(self) -> None:
        """Comes back when somebody is inside."""
        await self._wanted.wait()

    @asynccontextmanager
    async def entered(self, count: int) -> AsyncIterator[None]:
        """Holds that many places."""
        await self._enter(count)
        self._rests.clear()
        self._wanted.set()
        started = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += WEIGHT * (time.monotonic() - started - self._mean_s)
            self._give_back(count)

    async def _enter(self, count: int) -> None:
        if not self._line and count <= self.free:
            self.free -= count
            return
        if len(self._line) >= self.most_waiting:
            expected = self._mean_s * (len(self._line) + 1) / self.places
            raise Overloaded(min(LONGEST_RETRY_S, max(1, ceil(expected))))
        turn = asyncio.Event()
        entry = (count, turn)
        self._line.append(entry)
        try:
            await turn.wait()
        except asyncio.CancelledError:
            if turn.is_set():  # let in and given up in the same moment
                self._give_back(count)
            else:
                self._line.remove(entry)
                self._let_in()
            raise

    def _give_back(self, count: int) -> None:
        self.free += count
        self._let_in()
        if self.free == self.places:
            self._wanted.clear()
            self._rests.set()

    def _let_in(self) -> None:
        while self._line and self._line[0][0] <= self.free:
            count, turn = self._line.popleft()
            self.free -= count
            turn.set()
