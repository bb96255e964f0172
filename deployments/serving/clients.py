"""Drafter and verifier at the other end of Ray Serve's handles, where replicas may die, hang or be busy."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.api.backend import Session
from deployments.observability.metrics import LostCause
from deployments.serving.calls import Within, call, items, result, stage
from deployments.serving.circuit_breaker import Watch
from parse.prompts import VerificationSuffix
from parse.protocol import NO_STREAMING, GenerationRequest
from parse.types import DraftUnavailable, EngineStopped, MethodChoice, SamplingParams, TokenDelta, VerifyResult

logger = logging.getLogger(__name__)

MOST_RETRIES = 8  # of one request; each waits for a replica that answers
PAUSE_S = 0.1  # before a retry, and twice as long before each further one
PLAIN = SamplingParams()
CAUSES: Mapping[type[Exception], LostCause] = {
    RayActorError: "died",
    TaskCancelledError: "cancelled",
    EngineStopped: "stopped",
    DeploymentUnavailableError: "unavailable",
}
LOST = tuple(CAUSES)


class VerifierLost(EngineStopped):
    """Verifiers died on this request, one after the other."""


class RemoteVerifier:
    """`parse.protocol.Verifier` for one request: what is lost with a replica is asked again of another."""

    def __init__(self, handle: DeploymentHandle, session: Session, watch: Watch) -> None:
        self._handle, self._session, self._watch = handle, session, watch

    def _at_work(self) -> AbstractContextManager[None]:
        return self._watch.at_work() if self._session.counted else nullcontext()

    async def warm(self, prompt: Sequence[int]) -> int:
        with stage("warm", self._session) as within:
            return await self._called("warm", within, prompt)

    async def judge(
        self,
        prompt: Sequence[int],
        draft: Sequence[int],
        cuts: Sequence[int],
        check: VerificationSuffix,
        *,
        full: float | None = None,
        prefix: float | None = None,
        logprobs: int | None = None,
    ) -> VerifyResult:
        with stage("judge", self._session) as within, self._at_work():
            return await self._called("judge", within, prompt, draft, cuts, check, full, prefix, logprobs)

    async def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        sampling: SamplingParams = PLAIN,
        *,
        proposal: Sequence[int] = (),
        piece: int = 1,
        speculation: MethodChoice | None = None,
    ) -> AsyncGenerator[TokenDelta]:
        """A retry goes on from what has been passed on already."""
        said, left = tuple(output), tuple(proposal)
        with stage("write", self._session) as within, self._at_work():
            while True:
                handle = self._handle.options(method_name="generate", session_id=self._session.id, stream=True)
                try:
                    writing = call(handle, within, prompt, said, sampling, left, piece, speculation)
                    async for tokens in items(writing):
                        self._watch.heard()
                        said += tokens.token_ids
                        left = left[len(tokens.token_ids) :] if tokens.num_accepted == len(tokens.token_ids) else ()
                        yield tokens
                        if tokens.finish_reason:
                            return
                    raise EngineStopped("the stream ended before the answer")
                except LOST as error:
                    await self._another(error)

    async def _called(self, method: str, within: Within, *given: Any) -> Any:
        while True:
            handle = self._handle.options(method_name=method, session_id=self._session.id)
            try:
                found = await result(call(handle, within, *given))
                self._watch.heard()
                return found
            except LOST as error:
                await self._another(error)

    async def _another(self, error: Exception) -> None:
        """A changed session leads to another replica, where there is one."""
        if self._session.retries >= MOST_RETRIES:
            raise VerifierLost("the verifiers keep failing") from error
        logger.warning(
            "a verifier was lost (%s); its call is made again",
            type(error).__name__,
            extra={"request_id": self._session.request_id},
        )
        await asyncio.sleep(PAUSE_S * 2**self._session.retries)
        self._session.lost.append(next(cause for kind, cause in CAUSES.items() if isinstance(error, kind)))


class RemoteDrafter:
    """`parse.protocol.Drafter` for one request: whatever goes wrong, there is no draft, and soon."""

    def __init__(self, handle: DeploymentHandle, session: Session, watch: Watch) -> None:
        self._handle, self._session, self._watch = handle, session, watch

    async def draft(
        self, request: GenerationRequest, output: Sequence[int], *, stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        asked = replace(request, prediction=None)
        session = self._session.id
        with stage("draft", self._session) as within:
            async with self._watch.while_it_answers():
                try:
                    if stream_interval >= NO_STREAMING:
                        handle = self._handle.options(method_name="draft_whole", session_id=session)
                        draft = await result(call(handle, within, asked, output))
                        self._watch.heard()
                        yield draft
                    else:
                        handle = self._handle.options(method_name="draft", session_id=session, stream=True)
                        async for tokens in items(call(handle, within, asked, output, stream_interval)):
                            self._watch.heard()
                            yield tokens
                except BackPressureError:
                    raise DraftUnavailable("busy", "the drafters are busy") from None
                except LOST as error:
                    self._watch.suspect(type(error).__name__)
                    raise DraftUnavailable("lost", "the drafter was lost") from error
