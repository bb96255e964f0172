"""What it costs to be lossy: some answers with accepted drafts are asked again of the target alone, and compared.

Only while nobody else wants anything; whoever comes has the service to himself at once, and the audit begins again
later.
"""

import asyncio
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from deployments.api.admission import Gate
from deployments.api.responses import Answer
from deployments.config import AuditSettings
from deployments.observability import metrics
from deployments.observability.metrics import AuditResult, Meters
from deployments.observability.tracing import tracer
from parse.pipeline import Pipeline
from parse.protocol import NO_STREAMING, GenerationRequest, Mode, TextDelta

logger = logging.getLogger(__name__)

LOSSY: frozenset[Mode] = frozenset({"full", "progressive", "rounds"})
MOST_WAITING = 256
MOST_TRIES = 8
TAIL = 2000  # characters, of which the last match counts: others wait while it is looked for
QUIET_S = 0.25  # between two requests of one client the service is not idle


@dataclass
class Case:
    """An answer as it was sent."""

    request_id: str
    question: GenerationRequest
    text: str
    ids: Sequence[int]
    tries: int = 0


class Auditor:
    """Belongs to one event loop."""

    def __init__(self, settings: AuditSettings, gate: Gate, meters: Meters, pipeline: Callable[[], Pipeline]) -> None:
        self._settings, self._gate, self._meters, self._pipeline = settings, gate, meters, pipeline
        self._result = re.compile(settings.result) if settings.result else None
        self._cases: deque[Case] = deque()
        self._came = asyncio.Event()

    def offer(self, request_id: str, question: GenerationRequest, answer: Answer) -> None:
        usage = answer.ended.usage
        if usage.mode not in LOSSY or not usage.accepted_tokens or random.random() >= self._settings.share:
            return
        ids = [token for piece in answer.pieces for token in piece.token_ids]
        self._cases.append(Case(request_id, question, answer.text, ids))
        if len(self._cases) > MOST_WAITING:
            self._drop(self._cases.popleft())
        self._came.set()

    async def work(self) -> None:
        """For ever."""
        while True:
            await self._came.wait()
            await self._gate.rests(QUIET_S)
            if not self._cases:
                self._came.clear()
                continue
            await self._try(self._cases.popleft())

    async def _try(self, case: Case) -> None:
        case.tries += 1
        auditing = asyncio.create_task(self._audit(case))
        wanted = asyncio.create_task(self._gate.is_wanted())
        try:
            await asyncio.wait((auditing, wanted), return_when=asyncio.FIRST_COMPLETED)
            if auditing.done():
                self._meters.add(metrics.AUDITS, result=auditing.result())
            elif case.tries >= MOST_TRIES:
                self._drop(case)
            else:
                self._cases.append(case)
        except Exception:
            logger.warning("an audit failed", exc_info=True, extra={"request_id": case.request_id})
            self._drop(case)
        finally:
            auditing.cancel()
            wanted.cancel()
            await asyncio.gather(auditing, wanted, return_exceptions=True)

    async def _audit(self, case: Case) -> AuditResult:
        with tracer.start_as_current_span("audit", attributes={"request_id": case.request_id}):
            return await self._compared(case, self._pipeline())

    async def _compared(self, case: Case, pipeline: Pipeline) -> AuditResult:
        # Two samples of one model differ by chance: what is compared with is the likeliest.
        sampling = replace(case.question.sampling_params, temperature=0.0)
        alone = replace(
            case.question, mode="off", sampling_params=sampling, prediction=None, stream_interval=NO_STREAMING
        )
        pieces = [event async for event in pipeline.answer(alone) if isinstance(event, TextDelta)]
        text, ids = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.token_ids]
        sent, own = [await _likelihood(pipeline, case.question.prompt_token_ids, answer) for answer in (case.ids, ids)]
        self._meters.observe(metrics.AUDIT_GAP, max(0.0, own - sent))
        wanted, found = self._found(text), self._found(case.text)
        agrees = own - sent <= self._settings.gap if wanted is None else wanted == found
        if not agrees:
            logger.info("the target answers otherwise", extra={"request_id": case.request_id, "gap": own - sent})
        return "agree" if agrees else "disagree"

    def _found(self, text: str) -> tuple[str, ...] | None:
        """What counts in an answer, if that is known."""
        if self._result is None:
            return None
        last = None
        for last in self._result.finditer(text[-TAIL:]):  # noqa: B007
            pass
        return None if last is None else last.groups() or (last.group(),)

    def _drop(self, case: Case) -> None:
        self._meters.add(metrics.AUDITS, result="dropped")


async def _likelihood(pipeline: Pipeline, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """The target's mean log-probability of the tokens, each after those before it."""
    if not ids:
        return 0.0
    judged = await pipeline.verifier.judge(prompt, ids, [len(ids)], pipeline.check, logprobs=0)
    return fmean(found.logprob for found in judged.logprobs)
