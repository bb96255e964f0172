"""Tests audits with a scripted target.

Its answers and log-probabilities are known.
"""

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.api.admission import AdmissionQueue
from deployments.config import AuditSettings
from deployments.observability.audit import MAX_ATTEMPTS, Auditor
from deployments.observability.choice_state import ChoiceState
from deployments.observability.metrics import ROUTER_METRICS, MetricsRecorder
from deployments.session import Session
from parse.events import Finished, TextDelta, Usage
from parse.requests import GenerationRequest
from parse.types import Logprob, SamplingParams, VerifyResult
from tests.deployments import virtual_time

NUMBER = r"\d+"
REQUEST = GenerationRequest(
    (1, 2), sampling_params=SamplingParams(temperature=0.0, max_tokens=9), mode="full", prediction=(7,)
)


class Target:
    """A target with a fixed answer and a fixed log-probability for each text."""

    suffix = None
    eos_token_ids = frozenset({2})

    def __init__(self, text: str, likelihoods: dict[tuple[int, ...], float] | None = None, wait_s: float = 0.0) -> None:
        self.text, self.likelihoods, self.wait_s = text, likelihoods or {}, wait_s
        self.requests: list[GenerationRequest] = []
        self.verifier = self

    async def generate(self, request: GenerationRequest):
        self.requests.append(request)
        await asyncio.sleep(self.wait_s)
        yield TextDelta(self.text, (50, 51), "target")
        yield Finished("stop", Usage("off", target_tokens=2))

    async def verify(self, request) -> VerifyResult:
        draft = tuple(request.draft_token_ids)
        assert tuple(request.prefix_lengths) == () and request.num_logprobs == 0
        chance = self.likelihoods.get(draft, -1.0)
        return VerifyResult((0.5,), tuple(Logprob(chance + delta) for delta in (-0.1, 0.1)))


def sent(text: str, **usage: Any) -> ChoiceState:
    answer = ChoiceState(0, 2, Session("s"), 0.0)
    answer.add_event(TextDelta(text, (30, 31), "draft"))
    answer.add_event(Finished("stop", replace(Usage("full", draft_tokens=2, accepted_tokens=2), **usage)))
    return answer


class Audited:
    def __init__(self, target: Target, **settings: Any) -> None:
        self.admission_queue, self.meters = AdmissionQueue(2, 2), MetricsRecorder(ROUTER_METRICS, deployment="Router")
        self.target = target
        audit_settings = AuditSettings(**{"share": 1.0} | settings)
        self.auditor = Auditor(audit_settings, self.admission_queue, self.meters, lambda: target)  # type: ignore[arg-type, return-value]

    def results(self) -> dict[str, float]:
        return {sample.labels["result"]: sample.value for sample in self._samples("parse_audits_total") if sample.value}

    def gaps(self) -> tuple[float, float]:
        (count,), (total,) = (self._samples(f"parse_audit_gap_nats_{end}") for end in ("count", "sum"))
        return count.value, total.value

    def _samples(self, name: str) -> list[Any]:
        return [s for family in self.meters.collect().families for s in family.samples if s.name == name]

    async def until(self, condition) -> None:
        working = asyncio.create_task(self.auditor.run())
        try:
            async with asyncio.timeout(20):
                while not condition():
                    await asyncio.sleep(0.005)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr("deployments.observability.audit.MIN_IDLE_S", 0.01)


@pytest.mark.parametrize(
    ("own", "sent_text", "result"),
    [
        ("It is 12.", "So 12 in all", "agree"),
        ("It is 12.", "So 13 in all", "disagree"),
        ("First 5. It is 12.", "First 12. It is 5.", "disagree"),
        ("It is 12.", "No idea", "disagree"),
    ],
)
def test_answers_with_the_same_result_agree_in_any_wording(own, sent_text, result):
    async def check():
        audited = Audited(Target(own, {(30, 31): -9.0}), result=NUMBER)
        audited.auditor.submit("id", REQUEST, sent(sent_text))
        await audited.until(audited.results)
        assert audited.results() == {result: 1.0}
        count, total = audited.gaps()
        assert count == 1.0 and total == pytest.approx(8.0)
        (request,) = audited.target.requests
        assert (
            request.mode == "off" and request.prediction is None and request.sampling_params == REQUEST.sampling_params
        )

    asyncio.run(check())


@pytest.mark.parametrize("result", [None, NUMBER])
@pytest.mark.parametrize(
    ("logprob", "expected", "gap"), [(-1.3, "agree", 0.3), (-2.0, "disagree", 1.0), (-0.2, "agree", 0)]
)
def test_without_a_result_the_log_probability_gap_decides(result, logprob, expected, gap):
    async def check():
        audited = Audited(Target("none", {(30, 31): logprob}), result=result, gap=0.5)
        audited.auditor.submit("id", REQUEST, sent("12"))
        await audited.until(audited.results)
        assert audited.results() == {expected: 1.0}
        assert audited.gaps()[1] == pytest.approx(gap)

    asyncio.run(check())


def test_an_end_token_does_not_count():
    """The target ends its answer with one if log-probabilities are requested; a draft that is accepted has none."""

    async def check():
        target = Target("none", {(30, 31): -1.2})
        audited = Audited(target, gap=0.5)
        answer = sent("12")
        answer.deltas[0] = replace(answer.deltas[0], token_ids=(30, 31, 2))
        params = replace(REQUEST.sampling_params, logprobs=0, include_eos_token=True)
        audited.auditor.submit("id", replace(REQUEST, sampling_params=params), answer)
        await audited.until(audited.results)
        assert not target.requests[0].sampling_params.include_eos_token
        assert audited.results() == {"agree": 1.0} and audited.gaps()[1] == pytest.approx(0.2)

    asyncio.run(check())


@pytest.mark.parametrize(
    "usage",
    [{"mode": "off"}, {"mode": "exact"}, {"accepted_tokens": 0}],
    ids=["the target's own", "exact", "nothing accepted"],
)
def test_only_lossy_answers_with_accepted_drafts_are_audited(usage):
    async def check():
        audited = Audited(Target("12"), result=NUMBER)
        audited.auditor.submit("id", REQUEST, sent("13", **usage))
        audited.auditor.submit("id", REQUEST, sent("12"))
        await audited.until(audited.results)
        assert audited.results() == {"agree": 1.0} and len(audited.target.requests) == 1

    asyncio.run(check())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_configured_share_is_audited(share):
    async def check():
        random.seed(1)
        audited = Audited(Target("12"), share=share, result=NUMBER)
        for _ in range(200):
            audited.auditor.submit("id", REQUEST, sent("12"))
        chosen = len(audited.auditor._cases)
        assert (chosen == 0) if share == 0 else (30 < chosen < 70)
        await audited.until(lambda: not audited.auditor._cases)

    asyncio.run(check())


def test_a_request_interrupts_an_audit_which_starts_again_later():
    async def check():
        audited = Audited(Target("12", wait_s=0.1), result=NUMBER)
        audited.auditor.submit("id", REQUEST, sent("12"))
        interrupted = False

        async def client():
            nonlocal interrupted
            while not audited.target.requests:
                await asyncio.sleep(0.002)
            async with audited.admission_queue.hold_slots(1):
                await asyncio.sleep(0.2)
                interrupted = not audited.results() and len(audited.target.requests) == 1

        next_event = asyncio.create_task(client())
        await audited.until(audited.results)
        await next_event
        assert interrupted and len(audited.target.requests) == 2 and audited.results() == {"agree": 1.0}

    virtual_time.run(check())


def test_an_audit_without_idle_time_is_dropped_and_counted():
    async def check():
        audited = Audited(Target("12", wait_s=5), result=NUMBER)
        audited.auditor.submit("id", REQUEST, sent("12"))

        async def clients():
            while not audited.results():
                tries = len(audited.target.requests)
                while len(audited.target.requests) == tries and not audited.results():
                    await asyncio.sleep(0.002)
                async with audited.admission_queue.hold_slots(1):
                    await asyncio.sleep(0.005)

        next_event = asyncio.create_task(clients())
        await audited.until(audited.results)
        next_event.cancel()
        assert audited.results() == {"dropped": 1.0} and len(audited.target.requests) == MAX_ATTEMPTS

    virtual_time.run(check())


def test_a_failed_audit_does_not_stop_the_auditor():
    class Broken(Target):
        async def verify(self, request):
            raise ConnectionError("gone")

    async def check():
        audited = Audited(Broken("12"), result=NUMBER)
        for _ in range(2):
            audited.auditor.submit("id", REQUEST, sent("12"))
        await audited.until(lambda: audited.results() == {"dropped": 2.0})

    asyncio.run(check())


def test_an_invalid_expression_is_rejected():
    with pytest.raises(ValueError, match="must be a regular expression"):
        AuditSettings(result="(")


def test_an_audit_with_the_demo_pair_detects_a_wrong_answer(pair):
    """The draft contains a wrong sum on purpose. The service is the same as in production."""
    pipeline = pair.pipeline
    text = "First, Uma scores 73, above 27, so Uma leads with 73.\nSo Uma has the record now, with 73."
    request = "Kim has the record with 27. In turn: first Uma 73, second Max 52. Who has the record now?"
    ids = pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False
    )

    async def check():
        audited = Audited(SimpleNamespace(), result=NUMBER)  # type: ignore[arg-type]
        audited.auditor = Auditor(
            AuditSettings(share=1.0, result=NUMBER), audited.admission_queue, audited.meters, lambda: pipeline
        )
        for sent_text, number in ((text, 73), (text.replace("73.", "74."), 74)):
            answer = ChoiceState(0, len(prompt), Session("s"), 0.0)
            answer.add_event(TextDelta(sent_text, tuple(ids), "draft"))
            answer.add_event(Finished("stop", Usage("full", draft_tokens=len(ids), accepted_tokens=len(ids))))
            request = GenerationRequest(prompt, sampling_params=SamplingParams(temperature=0.0, max_tokens=120))
            audited.auditor.submit(str(number), request, answer)
        await audited.until(lambda: sum(audited.results().values()) == 2)
        assert audited.results() == {"agree": 1.0, "disagree": 1.0}
        assert audited.gaps()[0] == 2.0

    asyncio.run(check())
