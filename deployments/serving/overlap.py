"""How much of the time drafters and verifiers work side by side."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["drafter", "verifier"]


class Overlap:
    """For how long one router had something drafted, something judged or written, and both at once."""

    def __init__(self) -> None:
        self.drafter_s = self.verifier_s = self.both_s = 0.0
        self._at_work: dict[Part, int] = {"drafter": 0, "verifier": 0}
        self._told = time.perf_counter()

    @contextmanager
    def at_work(self, part: Part) -> Iterator[None]:
        self.tell()
        self._at_work[part] += 1
        try:
            yield
        finally:
            self.tell()
            self._at_work[part] -= 1

    def tell(self) -> None:
        """Brings the times up to now."""
        now = time.perf_counter()
        passed, self._told = now - self._told, now
        drafting, verifying = self._at_work["drafter"] > 0, self._at_work["verifier"] > 0
        self.drafter_s += passed * drafting
        self.verifier_s += passed * verifying
        self.both_s += passed * (drafting and verifying)
