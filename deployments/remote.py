"""Drafter and verifier at the other end of Ray Serve's handles, where replicas may die, hang or be busy."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.backend import Session
from parse.prompts import Check
from parse.protocol import WHOLE, Question
from parse.types import EngineStopped, Judged, NoDraft, Sampling, Tokens

logger = logging.getLogger(__name__)

MOST_RETRIES = 8  # of one request; each waits for a replica that answers
PAUSE_S = 0.1  # before a retry, and twice as long before each further one
WATCH_EVERY_S = 1.0
PATIENCE_S = 5.0  # with a replica that is asked whether it is alive
PLAIN = Sampling()
LOST = (RayActorError, TaskCancelledError, EngineStopped, DeploymentUnavailableError)


class VerifierLost(EngineStopped):
    """Verifiers died on this request, one after the other."""


class RemoteVerifier:
    """`parse.protocol.Verifier` for one request: what is lost with a replica is asked again of another."""

    def __init__(self, handle: DeploymentHandle, session: Session, watch: "Watch") -> None:
        self._handle, self._session, self._watch = handle, session, watch

    async def warm(self, prompt: Sequence[int]) -> int:
        return await self._called("warm", prompt)

    async def judge(
        self,
        prompt: Sequence[int],
        draft: Sequence[int],
        cuts: Sequence[int],
        check: Check,
        *,
        full: float | None = None,
        prefix: float | None = None,
        logprobs: int | None = None,
    ) -> Judged:
        return await self._called("judge", prompt, draft, cuts, check, full, prefix, logprobs)

    async def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        sampling: Sampling = PLAIN,
        *,
        proposal: Sequence[int] = (),
        piece: int = 1,
    ) -> AsyncGenerator[Tokens]:
        """A retry goes on from what has been passed on already."""
        said, left = tuple(output), tuple(proposal)
        while True:
            handle = self._handle.options(method_name="generate", session_id=self._session.id, stream=True)
            try:
                async for tokens in _items(_call(handle, prompt, said, sampling, left, piece)):
                    self._watch.heard()
                    said += tokens.ids
                    left = left[len(tokens.ids) :] if tokens.accepted == len(tokens.ids) else ()
                    yield tokens
                    if tokens.finish:
                        return
                raise EngineStopped("the stream ended before the answer")
            except LOST as error:
                await self._another(error)

    async def _called(self, method: str, *given: Any) -> Any:
        while True:
            handle = self._handle.options(method_name=method, session_id=self._session.id)
            try:
                result = await _result(_call(handle, *given))
                self._watch.heard()
                return result
            except LOST as error:
                await self._another(error)

    async def _another(self, error: Exception) -> None:
        """A changed session leads to another replica, where there is one."""
        if self._session.retries >= MOST_RETRIES:
            raise VerifierLost("the verifiers keep failing") from error
        logger.warning("a verifier was lost (%s); its call is made again", type(error).__name__)
        await asyncio.sleep(PAUSE_S * 2**self._session.retries)
        self._session.retries += 1


class RemoteDrafter:
    """`parse.protocol.Drafter` for one request: whatever goes wrong, there is no draft, and soon."""

    def __init__(self, handle: DeploymentHandle, session: Session, watch: "Watch") -> None:
        self._handle, self._session, self._watch = handle, session, watch

    async def draft(self, question: Question, output: Sequence[int], *, piece: int) -> AsyncGenerator[Tokens]:
        asked = replace(question, prediction=None)
        session = self._session.id
        async with self._watch.while_it_answers():
            try:
                if piece >= WHOLE:
                    handle = self._handle.options(method_name="draft_whole", session_id=session)
                    draft = await _result(_call(handle, asked, output))
                    self._watch.heard()
                    yield draft
                else:
                    handle = self._handle.options(method_name="draft", session_id=session, stream=True)
                    async for tokens in _items(_call(handle, asked, output, piece)):
                        self._watch.heard()
                        yield tokens
            except BackPressureError:
                raise NoDraft("busy", "the drafters are busy") from None
            except LOST as error:
                self._watch.suspect(type(error).__name__)
                raise NoDraft("lost", "the drafter was lost") from error


class Watch:
    """Whether a deployment answers: it is asked every second, so that no request has to find out by waiting."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self.trouble: str | None = None
        self._name, self._handle = name, handle.options(method_name="alive")
        self._waiting: set[asyncio.Timeout] = set()
        self._heard = 0.0
        self._task = asyncio.get_running_loop().create_task(self._keep_asking())

    @asynccontextmanager
    async def while_it_answers(self) -> AsyncIterator[None]:
        """Raises NoDraft as soon as it does not."""
        if self.trouble:
            raise NoDraft("silent", f"the {self._name} {self.trouble}")
        try:
            async with asyncio.timeout(None) as scope:
                self._waiting.add(scope)
                try:
                    yield
                finally:
                    self._waiting.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise NoDraft("silent", f"the {self._name} {self.trouble}") from None

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
                    await _result(_call(self._handle))
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


def _call(handle: DeploymentHandle, *given: Any) -> Any:
    """Outside of the request's context.

    There Ray Serve gives every call the request's own id, by which it finds the caller who waits for a replica: of two
    who wait at once, one would wait for ever. It would also end calls with the request in whose context they were
    made; ours are ended by whoever made them.
    """
    return contextvars.Context().run(handle.remote, *given)


async def _result(response: Any) -> Any:
    """Of a call, which is cancelled with the caller."""
    try:
        return await _plain(response)
    except BaseException:
        response.cancel()
        raise


async def _items(responses: Any) -> AsyncGenerator[Tokens]:
    """Of a stream, which is cancelled with its reader."""
    try:
        with suppress(StopAsyncIteration):
            while True:
                yield await _plain(anext(responses))
    finally:
        responses.cancel()


async def _plain(call: Awaitable[Any]) -> Any:
    """Errors of the replica as they were raised there."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and not task.cancelling():  # by Ray, not by our caller
            raise TaskCancelledError from None
        raise
