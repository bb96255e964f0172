"""Calls over handles that lose their replicas, hang, or are busy; the handles are scripted."""

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.serving import circuit_breaker, clients
from deployments.serving.circuit_breaker import CircuitBreaker
from deployments.serving.clients import DrafterClient, RetriesExhausted, VerifierClient
from deployments.serving.overlap import BusyTime
from deployments.session import Session
from parse.prompts import VerificationSuffix
from parse.protocol import NO_STREAMING, GenerationRequest
from parse.types import DraftUnavailable, EngineStopped, RequestError, SamplingParams, TokenDelta, VerifyResult

CHECK = VerificationSuffix((1,), (2,), (3,))
QUESTION = GenerationRequest((1, 2, 3))
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Handle:
    """Plays its script: a list for each call, of items to give and errors to raise; the last one plays on."""

    script: list
    calls: list = field(default_factory=list)
    cancelled: int = 0

    def options(self, **options):
        return Bound(self, options)


@dataclass
class Bound:
    handle: Handle
    options_given: dict

    def remote(self, *given):
        self.handle.calls.append((self.options_given, given))
        script = self.handle.script
        return Response(self.handle, list(script.pop(0) if len(script) > 1 else script[0]))


@dataclass
class Response:
    handle: Handle
    items: list

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if item is FOREVER:
            await asyncio.Event().wait()
        if isinstance(item, BaseException):
            raise item
        return item

    def __await__(self):
        return self.__anext__().__await__()

    def cancel(self):
        self.handle.cancelled += 1


FOREVER = object()
DEAF: Any = SimpleNamespace(record_success=lambda: None, track_busy_time=nullcontext)


def scripted(script: list) -> Any:
    return Handle(script)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(clients, "RETRY_BACKOFF_S", 0.001)
    monkeypatch.setattr(circuit_breaker, "HEALTH_CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(circuit_breaker, "HEALTH_CHECK_TIMEOUT_S", 0.05)


def raised_there(error):
    return RayTaskError("judge", "a traceback", error)


async def collect(stream):
    return [tokens async for tokens in stream]


@pytest.mark.parametrize("loss", [ActorDiedError(), raised_there(EngineStopped("shut down"))])
def test_a_stream_goes_on_elsewhere_from_what_was_passed_on(loss):
    handle = scripted(
        [
            [TokenDelta((10, 11), num_accepted=2), TokenDelta((12, 20), num_accepted=1), loss],
            [loss],
            [TokenDelta((21,)), TokenDelta((22,), finish_reason="stop")],
        ]
    )
    session = Session("s")
    stream = VerifierClient(handle, session, DEAF).generate(
        (1, 2), (5,), GREEDY, proposal=(10, 11, 12, 13), piece=4, speculation="ngram"
    )
    pieces = asyncio.run(collect(stream))
    assert [token for tokens in pieces for token in tokens.ids] == [10, 11, 12, 20, 21, 22]
    assert pieces[-1].finish == "stop" and session.num_retries == 2
    assert [given[1:] for _, given in handle.calls] == [
        ((5,), GREEDY, (10, 11, 12, 13), 4, "ngram"),
        ((5, 10, 11, 12, 20), GREEDY, (), 4, "ngram"),
        ((5, 10, 11, 12, 20), GREEDY, (), 4, "ngram"),
    ]
    assert [options["session_id"] for options, _ in handle.calls] == ["s", "s/1", "s/2"]


def test_of_a_proposal_taken_so_far_the_rest_is_proposed_again():
    handle = scripted(
        [
            [TokenDelta((10, 11), num_accepted=2), ActorDiedError()],
            [TokenDelta((12,), finish_reason="stop", num_accepted=1)],
        ]
    )
    asyncio.run(collect(VerifierClient(handle, Session("s"), DEAF).generate((1,), (), GREEDY, proposal=(10, 11, 12))))
    assert handle.calls[1][1] == ((1,), (10, 11), GREEDY, (12,), 1, None)


def test_a_stream_that_ends_before_the_answer_was_lost():
    handle = scripted([[TokenDelta((10,))], [TokenDelta((11,), finish_reason="length")]])
    pieces = asyncio.run(collect(VerifierClient(handle, Session("s"), DEAF).generate((1,), (), GREEDY)))
    assert [tokens.ids for tokens in pieces] == [(10,), (11,)]


def test_a_lost_judgement_is_asked_for_again_and_a_refused_one_is_not():
    verdict = VerifyResult((0.5,))
    handle = scripted([[ActorDiedError()], [verdict]])
    session = Session("s")
    assert asyncio.run(VerifierClient(handle, session, DEAF).judge((1,), (2,), (1,), CHECK, full=0.9)) == verdict
    assert session.num_retries == 1 and handle.calls[0][1] == ((1,), (2,), (1,), CHECK, 0.9, None, None)
    refusing = scripted([[raised_there(RequestError("draft", "is too long"))]])
    with pytest.raises(RequestError, match=r"^draft: is too long$"):
        asyncio.run(VerifierClient(refusing, session, DEAF).judge((1,), (2,), (1,), CHECK))
    assert len(refusing.calls) == 1


def test_verifiers_that_die_one_after_the_other_end_the_request():
    handle, session = scripted([[ActorDiedError()]]), Session("s")
    with pytest.raises(RetriesExhausted):
        asyncio.run(VerifierClient(handle, session, DEAF).warm((1,)))
    assert len(handle.calls) == clients.MAX_RETRIES + 1


def test_whoever_gives_up_cancels_the_call():
    handle = scripted([[FOREVER]])

    async def give_up():
        verifier = VerifierClient(handle, Session("s"), DEAF)
        judging = asyncio.create_task(verifier.judge((1,), (2,), (1,), CHECK))
        writing = asyncio.create_task(collect(verifier.generate((1,), (), GREEDY)))
        while len(handle.calls) < 2:
            await asyncio.sleep(0)
        for task in (judging, writing):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())
    assert handle.cancelled == 2


async def drafted(handle, alive, *, piece=NO_STREAMING, session=None):
    watch = CircuitBreaker("drafter", alive, BusyTime())
    try:
        drafter = DrafterClient(handle, session or Session("s"), watch)
        return await collect(drafter.draft(QUESTION, (4,), stream_interval=piece))
    finally:
        watch.close()


def test_whole_drafts_come_in_a_call_and_windows_in_a_stream():
    whole = scripted([[TokenDelta((7, 8), finish_reason="stop")]])
    assert asyncio.run(drafted(whole, scripted([[None]]))) == [TokenDelta((7, 8), finish_reason="stop")]
    assert whole.calls[0][0] == {"method_name": "draft_complete", "session_id": "s"}
    windows = scripted([[TokenDelta((7,)), TokenDelta((8,), finish_reason="stop")]])
    assert len(asyncio.run(drafted(windows, scripted([[None]]), piece=4))) == 2
    assert windows.calls[0][0] == {"method_name": "draft", "session_id": "s", "stream": True}
    assert windows.calls[0][1] == (QUESTION, (4,), 4)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(BackPressureError(1, 1), "the drafters are busy"), (ActorDiedError(), "the drafter was lost")],
)
def test_what_goes_wrong_with_a_drafter_leaves_no_draft(error, reason):
    for piece in (NO_STREAMING, 4):
        with pytest.raises(DraftUnavailable, match=reason):
            asyncio.run(drafted(scripted([[error]]), scripted([[None]]), piece=piece))


def test_a_drafter_that_hangs_is_given_up_and_not_asked_again_until_it_answers():
    alive = scripted([[None], [None], [FOREVER], [FOREVER], [None]])
    hanging, well = scripted([[FOREVER]]), scripted([[TokenDelta((7,), finish_reason="stop")]])

    async def requests():
        watch = CircuitBreaker("drafter", alive, BusyTime())
        drafters = {name: DrafterClient(h, Session("s"), watch) for name, h in (("h", hanging), ("w", well))}
        with pytest.raises(DraftUnavailable, match="the drafter does not answer"):
            await collect(drafters["h"].draft(QUESTION, (), stream_interval=NO_STREAMING))
        assert hanging.cancelled == 1
        with pytest.raises(DraftUnavailable, match="the drafter does not answer"):
            await collect(drafters["w"].draft(QUESTION, (), stream_interval=NO_STREAMING))
        assert not well.calls
        while watch.failure:
            await asyncio.sleep(0.005)
        assert await collect(drafters["w"].draft(QUESTION, (), stream_interval=NO_STREAMING))
        watch.close()

    asyncio.run(asyncio.wait_for(requests(), 30))


def test_after_a_death_there_are_no_drafts_until_one_answers():
    async def requests():
        watch = CircuitBreaker("drafter", scripted([[None], [ActorDiedError()], [None]]), BusyTime())
        dying = DrafterClient(scripted([[ActorDiedError()], [TokenDelta((7,))]]), Session("s"), watch)
        with pytest.raises(DraftUnavailable, match="lost"):
            await collect(dying.draft(QUESTION, (), stream_interval=NO_STREAMING))
        with pytest.raises(DraftUnavailable, match="ActorDiedError"):
            await collect(dying.draft(QUESTION, (), stream_interval=NO_STREAMING))
        while watch.failure:
            await asyncio.sleep(0.005)
        assert await collect(dying.draft(QUESTION, (), stream_interval=NO_STREAMING))
        watch.close()

    asyncio.run(asyncio.wait_for(requests(), 30))


def test_one_that_answers_others_is_well_though_our_question_waits_in_line():
    async def requests():
        watch = CircuitBreaker("verifier", scripted([[None], [FOREVER]]), BusyTime())
        verifier = VerifierClient(scripted([[7]]), Session("s"), watch)
        for _ in range(40):  # four times as long as its patience
            assert await verifier.warm((1,)) == 7
            await asyncio.sleep(0.005)
        assert watch.failure is None
        while watch.failure is None:
            await asyncio.sleep(0.005)
        assert watch.failure == "does not answer"
        watch.close()

    asyncio.run(asyncio.wait_for(requests(), 30))
