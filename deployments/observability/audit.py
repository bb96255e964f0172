"""Audits: the target alone regenerates some answers.

These are answers that contain accepted drafts. The two answers are compared.

Audits measure how often drafts change results. They run while the router is idle. If a client's request arrives during
an audit, the audit is cancelled and starts again later.
"""

import asyncio
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Protocol

from deployments.config import AuditSettings
from deployments.observability import metrics
from deployments.observability.choice_state import ChoiceState
from deployments.observability.metrics import AuditResult, MetricsRecorder
from deployments.observability.tracing import tracer
from parse.events import TextDelta
from parse.pipeline import Pipeline
from parse.registry import LOSSY_MODES
from parse.requests import GenerationRequest, VerifyRequest
from parse.types import NO_STREAMING

logger = logging.getLogger(__name__)

MAX_PENDING_CASES = 256
MAX_ATTEMPTS = 8
MAX_RESULT_SEARCH_CHARS = 2000  # a search blocks the event loop, so it must be short
MIN_IDLE_S = 0.25  # a shorter pause is probably one between two requests of the same client


class LoadMonitor(Protocol):
    async def wait_until_idle(self, seconds: float) -> None:
        """Returns when no request has been running for this many seconds."""
        ...

    async def wait_until_busy(self) -> None:
        """Returns as soon as a request is running."""
        ...


@dataclass
class AuditCase:
    """An answer as it was sent to the client."""

    request_id: str
    request: GenerationRequest
    text: str
    token_ids: Sequence[int]
    attempts: int = 0


class Auditor:
    """Chooses answers to audit and audits them. It belongs to one event loop."""

    def __init__(
        self,
        settings: AuditSettings,
        load_monitor: LoadMonitor,
        recorder: MetricsRecorder,
        create_pipeline: Callable[[], Pipeline],
    ) -> None:
        self._settings, self._load_monitor, self._recorder = settings, load_monitor, recorder
        self._create_pipeline = create_pipeline
        self._result_pattern = re.compile(settings.result) if settings.result else None
        self._cases: deque[AuditCase] = deque()
        self._case_added = asyncio.Event()

    def submit(self, request_id: str, request: GenerationRequest, choice: ChoiceState) -> None:
        usage = choice.result.usage
        if usage.mode not in LOSSY_MODES or not usage.accepted_tokens or random.random() >= self._settings.share:
            return
        token_ids = [token for delta in choice.deltas for token in delta.token_ids]
        self._cases.append(AuditCase(request_id, request, choice.text, token_ids))
        if len(self._cases) > MAX_PENDING_CASES:
            self._drop(self._cases.popleft())
        self._case_added.set()

    async def run(self) -> None:
        """Audits answers until it is cancelled."""
        while True:
            await self._case_added.wait()
            await self._load_monitor.wait_until_idle(MIN_IDLE_S)
            if not self._cases:
                self._case_added.clear()
                continue
            await self._attempt(self._cases.popleft())

    async def _attempt(self, case: AuditCase) -> None:
        case.attempts += 1
        audit_task = asyncio.create_task(self._audit(case))
        busy_task = asyncio.create_task(self._load_monitor.wait_until_busy())
        try:
            await asyncio.wait((audit_task, busy_task), return_when=asyncio.FIRST_COMPLETED)
            if audit_task.done():
                self._recorder.add(metrics.AUDITS, result=audit_task.result())
            elif case.attempts >= MAX_ATTEMPTS:
                self._drop(case)
            else:
                self._cases.append(case)
        except Exception:
            logger.warning("an audit failed and was dropped", exc_info=True, extra={"request_id": case.request_id})
            self._drop(case)
        finally:
            audit_task.cancel()
            busy_task.cancel()
            await asyncio.gather(audit_task, busy_task, return_exceptions=True)

    async def _audit(self, case: AuditCase) -> AuditResult:
        with tracer.start_as_current_span("audit", attributes={"request_id": case.request_id}):
            return await self._compare(case, self._create_pipeline())

    async def _compare(self, case: AuditCase, pipeline: Pipeline) -> AuditResult:
        # Two samples of one model differ by chance, so the target answers greedily. The end token is left out on both
        # sides, because a draft that was accepted as a whole has none.
        sampling_params = replace(case.request.sampling_params, temperature=0.0, include_eos_token=False)
        sent_ids = list(case.token_ids)
        if sent_ids and sent_ids[-1] in pipeline.eos_token_ids:
            sent_ids.pop()
        target_request = replace(
            case.request, mode="off", sampling_params=sampling_params, prediction=None, stream_interval=NO_STREAMING
        )
        deltas = [event async for event in pipeline.generate(target_request) if isinstance(event, TextDelta)]
        target_text = "".join(delta.text for delta in deltas)
        target_ids = [token for delta in deltas for token in delta.token_ids]
        if not (sent_ids and target_ids):  # an empty answer has no log-probability
            return "agree" if not (sent_ids or target_ids) else "disagree"
        sent_logprob, target_logprob = [
            await _mean_logprob(pipeline, case.request.prompt_token_ids, answer_ids)
            for answer_ids in (sent_ids, target_ids)
        ]
        self._recorder.observe(metrics.AUDIT_GAP, max(0.0, target_logprob - sent_logprob))
        target_result, sent_result = self._extract_result(target_text), self._extract_result(case.text)
        agrees = (
            target_logprob - sent_logprob <= self._settings.gap
            if target_result is None
            else target_result == sent_result
        )
        if not agrees:
            logger.info(
                "an audit disagrees: the target alone gives a different answer",
                extra={"request_id": case.request_id, "gap": target_logprob - sent_logprob},
            )
        return "agree" if agrees else "disagree"

    def _extract_result(self, text: str) -> tuple[str, ...] | None:
        """Returns the result in an answer, or None if there is no pattern or no match."""
        if self._result_pattern is None:
            return None
        last_match = None
        for last_match in self._result_pattern.finditer(text[-MAX_RESULT_SEARCH_CHARS:]):  # noqa: B007
            pass
        return None if last_match is None else last_match.groups() or (last_match.group(),)

    def _drop(self, case: AuditCase) -> None:
        self._recorder.add(metrics.AUDITS, result="dropped")


async def _mean_logprob(pipeline: Pipeline, prompt: Sequence[int], token_ids: Sequence[int]) -> float:
    """Returns the target's mean log-probability of the tokens of an answer.

    The log-probability of each token depends on those before it.
    """
    result = await pipeline.verifier.verify(
        VerifyRequest(
            prompt_token_ids=prompt,
            draft_token_ids=token_ids,
            prefix_lengths=(),  # nothing is verified
            suffix=pipeline.suffix,
            num_logprobs=0,
        )
    )
    return fmean(logprob.logprob for logprob in result.logprobs)
