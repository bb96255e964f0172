"""Clients of the drafter and verifier replicas, which may die, hang or be busy.

If a call to a verifier is lost, it is made again on another replica and continues after the tokens that have been
received. If a draft is lost, the answer only takes longer.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.serving.calls import CallContext, await_result, call_replica, stream_items, trace_stage
from deployments.serving.circuit_breaker import CircuitBreaker
from deployments.session import RetryCause, Session
from parse.errors import DraftUnavailable, EngineFailed, EngineStopped
from parse.requests import DraftRequest, GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import NO_STREAMING, TokenDelta, VerifyResult

logger = logging.getLogger(__name__)

MAX_RETRIES = 8  # per request; each retry waits for a replica that responds
RETRY_BACKOFF_S = 0.1  # before the first retry, and twice as long before each further one
RETRY_CAUSES: Mapping[type[Exception], RetryCause] = {
    RayActorError: "died",
    TaskCancelledError: "cancelled",
    EngineFailed: "died",
    EngineStopped: "stopped",
    DeploymentUnavailableError: "unavailable",
}
RETRYABLE_ERRORS = tuple(RETRY_CAUSES)


class RetriesExhausted(EngineStopped):
    """Raised if several verifiers in a row were lost while they served a request."""


class VerifierClient:
    """Implements `parse.engines.protocol.Verifier` for one request."""

    def __init__(self, handle: DeploymentHandle, session: Session, circuit_breaker: CircuitBreaker) -> None:
        self._handle, self._session, self._circuit_breaker = handle, session, circuit_breaker

    async def prefill(self, prompt_token_ids: Sequence[int], session_key: str = "") -> int:
        with trace_stage("warm", self._session) as context:
            return await self._call_with_retries("prefill", context, prompt_token_ids, session_key)

    async def verify(self, request: VerifyRequest) -> VerifyResult:
        with trace_stage("judge", self._session) as context, self._track_busy_time():
            return await self._call_with_retries("verify", context, request)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        """Generates tokens.

        If a stream breaks, it continues on another replica after the tokens that were received.
        """
        with trace_stage("write", self._session) as context, self._track_busy_time():
            while True:
                try:
                    async with aclosing(self._stream("generate", context, request)) as deltas:
                        async for delta in deltas:
                            request = _after(request, delta)
                            yield delta
                            if delta.finish_reason:
                                return
                    raise EngineStopped("the stream ended before the answer")
                except RETRYABLE_ERRORS as error:
                    await self._prepare_retry(error)

    async def verify_and_generate(self, request: VerifyAndGenerateRequest) -> AsyncGenerator[VerifyResult | TokenDelta]:
        """Verifies a draft and generates what follows.

        If the call is lost before the result arrives, the whole call is repeated. If it is lost later, only the
        generation continues on another replica.
        """
        result: VerifyResult | None = None
        rest: GenerateRequest | None = None
        with self._track_busy_time():
            with trace_stage("judge", self._session) as context:
                while result is None:
                    stream = self._stream("verify_and_generate", context, request)
                    try:
                        result = await anext(stream, None)
                        if result is None:
                            raise EngineStopped("the stream ended before the result of the verification")
                    except RETRYABLE_ERRORS as error:
                        await self._prepare_retry(error)
            try:
                yield result
                rest = request.continuation(request.accepted_prefix_length(result))
                if rest is None:
                    return
                with trace_stage("write", self._session):
                    try:
                        async for delta in stream:
                            rest = _after(rest, delta)
                            yield delta
                            if delta.finish_reason:
                                return
                        raise EngineStopped("the stream ended before the answer")
                    except RETRYABLE_ERRORS as error:
                        await self._prepare_retry(error)
            finally:
                await stream.aclose()
        async with aclosing(self.generate(rest)) as deltas:
            async for delta in deltas:
                yield delta

    def _track_busy_time(self) -> AbstractContextManager[None]:
        return self._circuit_breaker.track_busy_time() if self._session.counts_as_busy else nullcontext()

    async def _stream(self, method: str, context: CallContext, request: Any) -> AsyncGenerator[Any]:
        handle = self._handle.options(method_name=method, session_id=self._session.id, stream=True)
        async with aclosing(stream_items(call_replica(handle, context, request))) as items:
            async for item in items:
                self._circuit_breaker.record_success()
                yield item

    async def _call_with_retries(self, method: str, context: CallContext, *arguments: Any) -> Any:
        while True:
            handle = self._handle.options(method_name=method, session_id=self._session.id)
            try:
                result = await await_result(call_replica(handle, context, *arguments))
                self._circuit_breaker.record_success()
                return result
            except RETRYABLE_ERRORS as error:
                await self._prepare_retry(error)

    async def _prepare_retry(self, error: Exception) -> None:
        """Waits, and changes the session so that it uses another replica.

        If there is no other replica, the calls go to the same one again.
        """
        if self._session.num_retries >= MAX_RETRIES:
            raise RetriesExhausted(f"verifiers were lost {MAX_RETRIES + 1} times during this request") from error
        logger.warning(
            "a verifier was lost (%s); the call is repeated on another replica",
            type(error).__name__,
            extra={"request_id": self._session.request_id},
        )
        await asyncio.sleep(RETRY_BACKOFF_S * 2**self._session.num_retries)
        self._session.retry_causes.append(
            next(cause for error_class, cause in RETRY_CAUSES.items() if isinstance(error, error_class))
        )


def _after(request: GenerateRequest, delta: TokenDelta) -> GenerateRequest:
    """Returns the rest of a request after these tokens have been received."""
    still_follows_draft = delta.num_accepted == len(delta.token_ids)
    return replace(
        request,
        output_token_ids=(*request.output_token_ids, *delta.token_ids),
        draft_token_ids=request.draft_token_ids[len(delta.token_ids) :] if still_follows_draft else (),
    )


class DrafterClient:
    """Implements `parse.engines.protocol.Drafter` for one request.

    If drafters are lost, busy or do not respond, it soon raises DraftUnavailable.
    """

    def __init__(self, handle: DeploymentHandle, session: Session, circuit_breaker: CircuitBreaker) -> None:
        self._handle, self._session, self._circuit_breaker = handle, session, circuit_breaker

    async def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        session_id = self._session.id
        with trace_stage("draft", self._session) as context:
            async with self._circuit_breaker.fail_fast():
                try:
                    if request.stream_interval >= NO_STREAMING:
                        handle = self._handle.options(method_name="draft_complete", session_id=session_id)
                        draft = await await_result(call_replica(handle, context, request))
                        self._circuit_breaker.record_success()
                        yield draft
                    else:
                        handle = self._handle.options(method_name="draft", session_id=session_id, stream=True)
                        async with aclosing(stream_items(call_replica(handle, context, request))) as deltas:
                            async for delta in deltas:
                                self._circuit_breaker.record_success()
                                yield delta
                except BackPressureError:
                    raise DraftUnavailable("busy", "the drafters are busy") from None
                except RETRYABLE_ERRORS as error:
                    self._circuit_breaker.record_failure(f"was lost ({type(error).__name__})")
                    raise DraftUnavailable("lost", "the drafter was lost") from error
