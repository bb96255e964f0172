"""Engines that compute on the CPU of one process take turns, a step each.

Side by side they would fight for the interpreter at every operation: of two small models each was measured to take
three times as long. Models that are to compute at the same time belong into processes of their own.
"""

import threading
from collections import deque


class FairLock:
    """A lock that goes to whoever has waited longest; a plain one would go back to the engine that just gave it up."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._locked = False
        self._waiting: deque[threading.Lock] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __enter__(self) -> None:
        with self._mutex:
            if not self._locked:
                self._locked = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._locked = False


CPU_LOCK = FairLock()
