"""An event loop whose clock jumps to the next timer instead of waiting, so a test does not depend on the machine."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _JumpingSelector(selectors.DefaultSelector):
    """Advances a clock by the time for which the event loop would wait."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # there is no timer to jump to
            return super().select(None)
        self.now += max(0.0, timeout)
        return super().select(0)


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping_selector = _JumpingSelector()
        super().__init__(self._jumping_selector)

    def time(self) -> float:
        return self._jumping_selector.now


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine that waits only for timers and for other coroutines, not for threads or connections."""
    with asyncio.Runner(loop_factory=_VirtualTimeLoop) as runner:
        runner.run(main)
