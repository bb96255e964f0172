"""Measures how long drafters and verifiers work at the same time.

Nothing schedules this overlap. `CompletionHandler` runs the answers as concurrent tasks, so one answer can be drafted
while another one is verified.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

ServicePart = Literal["drafter", "verifier"]


class BusyTime:
    """The seconds in which drafters, verifiers, and both worked for one router."""

    def __init__(self) -> None:
        self.drafter_s = self.verifier_s = self.both_s = 0.0
        self._active_calls: dict[ServicePart, int] = {"drafter": 0, "verifier": 0}
        self._updated_at = time.perf_counter()

    @contextmanager
    def track(self, part: ServicePart) -> Iterator[None]:
        self.update()
        self._active_calls[part] += 1
        try:
            yield
        finally:
            self.update()
            self._active_calls[part] -= 1

    def update(self) -> None:
        """Adds the time since the last update to the totals."""
        now = time.perf_counter()
        elapsed, self._updated_at = now - self._updated_at, now
        drafting, verifying = self._active_calls["drafter"] > 0, self._active_calls["verifier"] > 0
        self.drafter_s += elapsed * drafting
        self.verifier_s += elapsed * verifying
        self.both_s += elapsed * (drafting and verifying)
