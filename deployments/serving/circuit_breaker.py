"""Circuit breakers: skip deployments that do not respond."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager

from ray.serve.handle import DeploymentHandle

from deployments.serving.busy_time import BusyTime, ServicePart
from deployments.serving.calls import NO_REQUEST, await_result, call_replica
from parse.errors import DraftUnavailable

logger = logging.getLogger(__name__)

HEALTH_CHECK_INTERVAL_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 5.0


class CircuitBreaker:
    """Checks every second whether a deployment responds.

    While it does not respond, calls fail at once instead of waiting for a timeout.
    """

    def __init__(self, name: ServicePart, handle: DeploymentHandle, busy_time: BusyTime) -> None:
        self.failure: str | None = None
        self._busy_time = busy_time
        self._name, self._handle = name, handle.options(method_name="alive")
        self._pending_timeouts: set[asyncio.Timeout] = set()
        self._last_success_at = 0.0
        self._task = asyncio.get_running_loop().create_task(self._health_check_loop())

    @asynccontextmanager
    async def fail_fast(self) -> AsyncIterator[None]:
        """Runs the block while the deployment responds.

        Raises DraftUnavailable as soon as it stops responding.
        """
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
        """Counts the time in the block as busy time of the deployment."""
        return self._busy_time.track(self._name)

    def record_success(self) -> None:
        """Notes that a call succeeded.

        A deployment whose calls succeed is available, even if it is so busy that the health check times out.
        """
        self._last_success_at = asyncio.get_running_loop().time()

    def record_failure(self, failure: str) -> None:
        """Opens the circuit until the next successful health check."""
        if self.failure is None:
            logger.warning("the %s is unavailable: it %s", self._name, failure)
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
                    logger.info("the %s responds again", self._name)
                self.failure = None
            await asyncio.sleep(HEALTH_CHECK_INTERVAL_S)

    def _open(self, failure: str) -> None:
        self.record_failure(failure)
        now = asyncio.get_running_loop().time()
        for scope in self._pending_timeouts:
            scope.reschedule(now)
