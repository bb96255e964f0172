"""Whether drafters and verifiers answer, and how long they were at work."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager

from ray.serve.handle import DeploymentHandle

from deployments.serving.calls import ALONE, call, result
from deployments.serving.overlap import Overlap, Part
from parse.types import DraftUnavailable

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 1.0
PATIENCE_S = 5.0  # with a replica that is asked whether it is alive


class Watch:
    """Whether a deployment answers: it is asked every second, so that no request has to find out by waiting."""

    def __init__(self, name: Part, handle: DeploymentHandle, overlap: Overlap) -> None:
        self.trouble: str | None = None
        self._overlap = overlap
        self._name, self._handle = name, handle.options(method_name="alive")
        self._waiting: set[asyncio.Timeout] = set()
        self._heard = 0.0
        self._task = asyncio.get_running_loop().create_task(self._keep_asking())

    @asynccontextmanager
    async def while_it_answers(self) -> AsyncIterator[None]:
        """Raises NoDraft as soon as it does not."""
        if self.trouble:
            raise DraftUnavailable("silent", f"the {self._name} {self.trouble}")
        try:
            async with asyncio.timeout(None) as scope:
                self._waiting.add(scope)
                try:
                    with self.at_work():
                        yield
                finally:
                    self._waiting.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DraftUnavailable("silent", f"the {self._name} {self.trouble}") from None

    def at_work(self) -> AbstractContextManager[None]:
        """For a request of ours."""
        return self._overlap.at_work(self._name)

    def heard(self) -> None:
        """It answered somebody. Where it has so much to do that our question waits in line, that says enough."""
        self._heard = asyncio.get_running_loop().time()

    def suspect(self, trouble: str) -> None:
        """Until it answers again."""
        if self.trouble is None:
            logger.warning("the %s has trouble: %s", self._name, trouble)
        self.trouble = trouble

    def close(self) -> None:
        self._task.cancel()

    async def _keep_asking(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await result(call(self._handle, ALONE))
            except TimeoutError:
                if self._heard < asked:
                    self._lost("does not answer")
            except Exception as error:
                self._lost(f"fails: {error}")
            else:
                if self.trouble is not None:
                    logger.info("the %s answers again", self._name)
                self.trouble = None
            await asyncio.sleep(WATCH_EVERY_S)

    def _lost(self, trouble: str) -> None:
        self.suspect(trouble)
        now = asyncio.get_running_loop().time()
        for scope in self._waiting:
            scope.reschedule(now)
