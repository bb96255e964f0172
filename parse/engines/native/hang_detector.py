"""Notices an engine that makes no progress although it has work."""

import time

from parse.engines.protocol import EngineStats

MAX_STEP_DURATION_S = 30.0  # an engine that needs longer for a step is considered hung


class HangDetector:
    def __init__(self) -> None:
        self._last_step_count, self._last_progress_at = 0, time.monotonic()

    def check(self, stats: EngineStats) -> None:
        """Raises if no step has ended for a long time. It is called regularly."""
        now = time.monotonic()
        if stats.num_steps != self._last_step_count or not stats.num_running:
            self._last_step_count, self._last_progress_at = stats.num_steps, now
        elif now - self._last_progress_at > MAX_STEP_DURATION_S:
            raise RuntimeError(f"the engine hangs: it has made no step for {MAX_STEP_DURATION_S:g} s")
