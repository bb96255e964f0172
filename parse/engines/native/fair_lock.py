"""A fair lock for engines in one process, which alternate step by step.

The engines share the CPU.

Without the lock they would compete for the interpreter at every operation. In a measurement with two small models,
each took three times as long. Models that should compute at the same time need separate processes.
"""

import threading
from collections import deque


class FairLock:
    """A lock that passes to the thread that has waited longest.

    A plain lock usually returns to the engine that has just released it.
    """

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
            own_lock = threading.Lock()
            own_lock.acquire()
            self._waiting.append(own_lock)
        own_lock.acquire()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._locked = False


CPU_LOCK = FairLock()
