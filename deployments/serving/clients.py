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

from deployments.serving.calls import CallContext, await_result, call_replica, stream_items, trace_stage
from deployments.serving.circuit_breaker import CircuitBreaker
from deployments.session import RetryCause, Session
from parse.prompts import VerificationSuffix
from parse.protocol import NO_STREAMING, GenerationRequest
from parse.types import DraftUnavailable, EngineStopped, MethodChoice, SamplingParams, TokenDelta, VerifyResult

logger = logging.getLogger(__name__)

MAX_RETRIES = 8  # of one request; each waits for a replica that answers
RETRY_BACKOFF_S = 0.1  # before a retry, and twice as long before each further one
DEFAULT_SAMPLING_PARAMS = SamplingParams()
RETRY_CAUSES: Mapping[type[Exception], RetryCause] = {
    RayActorError: "died",
    TaskCancelledError: "cancelled",
    EngineStopped: "stopped",
    DeploymentUnavailableError: "unavailable",
}
RETRYABLE_ERRORS = tuple(RETRY_CAUSES)


class RetriesExhausted(EngineStopped):
    """Verifiers died on this request, one after the other."""


class VerifierClient:
    """`parse.protocol.Verifier` for one request: what is lost with a replica is asked again of another."""

    def __init__(self, handle: DeploymentHandle, session: Session, circuit_breaker: CircuitBreaker) -> None:
        self._handle, self._session, self._circuit_breaker = handle, session, circuit_breaker

    def _track_busy_time(self) -> AbstractContextManager[None]:
        return self._circuit_breaker.track_busy_time() if self._session.counts_as_busy else nullcontext()

    async def warm(self, prompt: Sequence[int]) -> int:
        with trace_stage("warm", self._session) as context:
            return await self._call_with_retries("warm", context, prompt)

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
        with trace_stage("judge", self._session) as context, self._track_busy_time():
            return await self._call_with_retries("judge", context, prompt, draft, cuts, check, full, prefix, logprobs)

    async def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        sampling: SamplingParams = DEFAULT_SAMPLING_PARAMS,
        *,
        proposal: Sequence[int] = (),
        piece: int = 1,
        speculation: MethodChoice | None = None,
    ) -> AsyncGenerator[TokenDelta]:
        """A retry goes on from what has been passed on already."""
        generated_ids, remaining_proposal = tuple(output), tuple(proposal)
        with trace_stage("write", self._session) as context, self._track_busy_time():
            while True:
                handle = self._handle.options(method_name="generate", session_id=self._session.id, stream=True)
                try:
                    stream = call_replica(
                        handle, context, prompt, generated_ids, sampling, remaining_proposal, piece, speculation
                    )
                    async for tokens in stream_items(stream):
                        self._circuit_breaker.record_success()
                        generated_ids += tokens.token_ids
                        remaining_proposal = (
                            remaining_proposal[len(tokens.token_ids) :]
                            if tokens.num_accepted == len(tokens.token_ids)
                            else ()
                        )
                        yield tokens
                        if tokens.finish_reason:
                            return
                    raise EngineStopped("the stream ended before the answer")
                except RETRYABLE_ERRORS as error:
                    await self._prepare_retry(error)

    async def _call_with_retries(self, method: str, context: CallContext, *args: Any) -> Any:
        while True:
            handle = self._handle.options(method_name=method, session_id=self._session.id)
            try:
                result = await await_result(call_replica(handle, context, *args))
                self._circuit_breaker.record_success()
                return result
            except RETRYABLE_ERRORS as error:
                await self._prepare_retry(error)

    async def _prepare_retry(self, error: Exception) -> None:
        """A changed session leads to another replica, where there is one."""
        if self._session.num_retries >= MAX_RETRIES:
            raise RetriesExhausted("the verifiers keep failing") from error
        logger.warning(
            "a verifier was lost (%s); its call is made again",
            type(error).__name__,
            extra={"request_id": self._session.request_id},
        )
        await asyncio.sleep(RETRY_BACKOFF_S * 2**self._session.num_retries)
        self._session.retry_causes.append(
            next(cause for error_class, cause in RETRY_CAUSES.items() if isinstance(error, error_class))
        )


class DrafterClient:
    """`parse.protocol.Drafter` for one request: whatever goes wrong, there is no draft, and soon."""

    def __init__(self, handle: DeploymentHandle, session: Session, circuit_breaker: CircuitBreaker) -> None:
        self._handle, self._session, self._circuit_breaker = handle, session, circuit_breaker

    async def draft(
        self, request: GenerationRequest, output: Sequence[int], *, stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        draft_request = replace(request, prediction=None)
        session_id = self._session.id
        with trace_stage("draft", self._session) as context:
            async with self._circuit_breaker.fail_fast():
                try:
                    if stream_interval >= NO_STREAMING:
                        handle = self._handle.options(method_name="draft_complete", session_id=session_id)
                        draft = await await_result(call_replica(handle, context, draft_request, output))
                        self._circuit_breaker.record_success()
                        yield draft
                    else:
                        handle = self._handle.options(method_name="draft", session_id=session_id, stream=True)
                        async for tokens in stream_items(
                            call_replica(handle, context, draft_request, output, stream_interval)
                        ):
                            self._circuit_breaker.record_success()
                            yield tokens
                except BackPressureError:
                    raise DraftUnavailable("busy", "the drafters are busy") from None
                except RETRYABLE_ERRORS as error:
                    self._circuit_breaker.record_failure(type(error).__name__)
                    raise DraftUnavailable("lost", "the drafter was lost") from error
