"""Whether drafters and verifiers answer, and how long they were at work."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager

from ray.serve.handle import DeploymentHandle

from deployments.serving.calls import NO_REQUEST, await_result, call_replica
from deployments.serving.overlap import BusyTime, ServicePart
from parse.errors import DraftUnavailable

logger = logging.getLogger(__name__)

HEALTH_CHECK_INTERVAL_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 5.0  # with a replica that is asked whether it is alive


class CircuitBreaker:
    """Whether a deployment answers: it is asked every second, so that no request has to find out by waiting."""

    def __init__(self, name: ServicePart, handle: DeploymentHandle, busy_time: BusyTime) -> None:
        self.failure: str | None = None
        self._busy_time = busy_time
        self._name, self._handle = name, handle.options(method_name="alive")
        self._pending_timeouts: set[asyncio.Timeout] = set()
        self._last_success_at = 0.0
        self._task = asyncio.get_running_loop().create_task(self._health_check_loop())

    @asynccontextmanager
    async def fail_fast(self) -> AsyncIterator[None]:
        """Raises NoDraft as soon as it does not."""
        if self.failure:
            raise DraftUnavailable("silent", f"the {self._name} {self.failure}")
        try:
            async with asyncio.timeout(None) as scope:
                self._pending_timeouts.add(scope)
                try:
                    with self.track_busy_time():
                        yield
                finally:
                    self._pending_timeouts.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DraftUnavailable("silent", f"the {self._name} {self.failure}") from None

    def track_busy_time(self) -> AbstractContextManager[None]:
        """For a request of ours."""
        return self._busy_time.track(self._name)

    def record_success(self) -> None:
        """It answered somebody. Where it has so much to do that our question waits in line, that says enough."""
        self._last_success_at = asyncio.get_running_loop().time()

    def record_failure(self, failure: str) -> None:
        """Until it answers again."""
        if self.failure is None:
            logger.warning("the %s has trouble: %s", self._name, failure)
        self.failure = failure

    def close(self) -> None:
        self._task.cancel()

    async def _health_check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                async with asyncio.timeout(HEALTH_CHECK_TIMEOUT_S):
                    await await_result(call_replica(self._handle, NO_REQUEST))
            except TimeoutError:
                if self._last_success_at < started:
                    self._open("does not answer")
            except Exception as error:
                self._open(f"fails: {error}")
            else:
                if self.failure is not None:
                    logger.info("the %s answers again", self._name)
                self.failure = None
            await asyncio.sleep(HEALTH_CHECK_INTERVAL_S)

    def _open(self, failure: str) -> None:
        self.record_failure(failure)
        now = asyncio.get_running_loop().time()
        for scope in self._pending_timeouts:
            scope.reschedule(now)
