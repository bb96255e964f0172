"""Tests calls over scripted handles that lose their replicas, hang or are busy."""

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.serving import circuit_breaker, replica_clients
from deployments.serving.busy_time import BusyTime
from deployments.serving.circuit_breaker import CircuitBreaker
from deployments.serving.replica_clients import DrafterClient, RetriesExhausted, VerifierClient
from deployments.session import Session
from parse.errors import DraftUnavailable, EngineFailed, EngineStopped, RequestError
from parse.prompts import VerificationSuffix
from parse.requests import DraftRequest, GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import NO_STREAMING, SamplingParams, TokenDelta, VerifyResult

VERIFY = VerifyRequest(
    prompt_token_ids=(1,),
    draft_token_ids=(2, 3),
    prefix_lengths=(1, 2),
    suffix=VerificationSuffix((1,), (2,), (3,)),
)


def generate_request(output=(), draft=(), **fields):
    return GenerateRequest(
        prompt_token_ids=(1,),
        output_token_ids=output,
        sampling_params=SamplingParams(temperature=0.0),
        draft_token_ids=draft,
        **fields,
    )


@dataclass
class Handle:
    """A scripted handle.

    The script has a list for each call, with items to return and errors to raise. Further calls use the last list.
    """

    script: list
    calls: list = field(default_factory=list)
    cancelled: int = 0

    def options(self, **options):
        return Bound(self, options)


@dataclass
class Bound:
    handle: Handle
    options: dict

    def remote(self, *args):
        self.handle.calls.append((self.options, args))
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
    monkeypatch.setattr(replica_clients, "RETRY_BACKOFF_S", 0.001)
    monkeypatch.setattr(circuit_breaker, "HEALTH_CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(circuit_breaker, "HEALTH_CHECK_TIMEOUT_S", 0.05)


def raised_there(error):
    return RayTaskError("verify", "a traceback", error)


async def collect(stream):
    return [item async for item in stream]


@pytest.mark.parametrize(
    "loss", [ActorDiedError(), raised_there(EngineStopped("shut down")), raised_there(EngineFailed("CUDA error"))]
)
def test_a_broken_stream_continues_on_another_replica_after_the_received_tokens(loss):
    handle = scripted(
        [
            [TokenDelta((10, 11), num_accepted=2), TokenDelta((12, 20), num_accepted=1), loss],
            [loss],
            [TokenDelta((21,)), TokenDelta((22,), finish_reason="stop")],
        ]
    )
    session = Session("s")
    request = generate_request((5,), (10, 11, 12, 13), stream_interval=4, speculative_method="ngram")
    deltas = asyncio.run(collect(VerifierClient(handle, session, DEAF).generate(request)))
    assert [token for delta in deltas for token in delta.token_ids] == [10, 11, 12, 20, 21, 22]
    assert deltas[-1].finish_reason == "stop" and session.num_retries == 2
    rest = replace(request, output_token_ids=(5, 10, 11, 12, 20), draft_token_ids=())
    assert [request for _, (request,) in handle.calls] == [request, rest, rest]
    assert [options["session_id"] for options, _ in handle.calls] == ["s", "s/1", "s/2"]


def test_after_a_retry_the_rest_of_the_draft_is_proposed_again():
    handle = scripted(
        [
            [TokenDelta((10, 11), num_accepted=2), ActorDiedError()],
            [TokenDelta((12,), finish_reason="stop", num_accepted=1)],
        ]
    )
    asyncio.run(collect(VerifierClient(handle, Session("s"), DEAF).generate(generate_request((), (10, 11, 12)))))
    assert handle.calls[1][1] == (generate_request((10, 11), (12,)),)


def test_a_stream_that_ends_before_the_answer_counts_as_lost():
    handle = scripted([[TokenDelta((10,))], [TokenDelta((11,), finish_reason="length")]])
    deltas = asyncio.run(collect(VerifierClient(handle, Session("s"), DEAF).generate(generate_request())))
    assert [delta.token_ids for delta in deltas] == [(10,), (11,)]


def test_a_lost_verification_is_repeated_and_a_rejected_one_is_not():
    result = VerifyResult((0.5, 0.4))
    handle = scripted([[ActorDiedError()], [result]])
    session = Session("s")
    assert asyncio.run(VerifierClient(handle, session, DEAF).verify(VERIFY)) == result
    assert session.num_retries == 1 and handle.calls[0][1] == (VERIFY,)
    refusing = scripted([[raised_there(RequestError("draft", "is too long"))]])
    with pytest.raises(RequestError, match=r"^draft: is too long$"):
        asyncio.run(VerifierClient(refusing, session, DEAF).verify(VERIFY))
    assert len(refusing.calls) == 1


FUSED = VerifyAndGenerateRequest(
    verify=VERIFY, sampling_params=SamplingParams(temperature=0.0), speculative_method="ngram"
)


@pytest.mark.parametrize(
    "loss", [ActorDiedError(), raised_there(EngineStopped("shut down")), raised_there(EngineFailed("CUDA error"))]
)
def test_a_fused_call_that_is_lost_before_its_result_is_repeated(loss):
    result = VerifyResult((0.99, 0.1))
    handle = scripted([[loss], [], [result, TokenDelta((9,), finish_reason="stop")]])
    session = Session("s")
    items = asyncio.run(collect(VerifierClient(handle, session, DEAF).verify_and_generate(FUSED)))
    assert items == [result, TokenDelta((9,), finish_reason="stop")] and session.num_retries == 2
    assert [request for _, (request,) in handle.calls] == [FUSED] * 3
    assert {options["method_name"] for options, _ in handle.calls} == {"verify_and_generate"}


@pytest.mark.parametrize("received", [[], [TokenDelta((9, 8))]])
def test_a_fused_call_that_is_lost_after_its_result_continues_from_the_accepted_prefix(received):
    result = VerifyResult((0.99, 0.1))
    handle = scripted([[result, *received, ActorDiedError()], [TokenDelta((7,), finish_reason="stop")]])
    session = Session("s")
    items = asyncio.run(collect(VerifierClient(handle, session, DEAF).verify_and_generate(FUSED)))
    assert items == [result, *received, TokenDelta((7,), finish_reason="stop")] and session.num_retries == 1
    output = (
        2,
        *(token for delta in received for token in delta.token_ids),
    )  # the first token of the draft was accepted
    assert handle.calls[1][0]["method_name"] == "generate"
    assert handle.calls[1][1] == (generate_request(output, speculative_method="ngram"),)


def test_a_fused_call_whose_draft_is_accepted_ends_with_the_result():
    result = VerifyResult((0.99, 0.99))
    accepting = replace(FUSED, verify=replace(VERIFY, draft_complete=True))
    handle = scripted([[result]])
    assert asyncio.run(collect(VerifierClient(handle, Session("s"), DEAF).verify_and_generate(accepting))) == [result]
    assert handle.cancelled == 1


def test_too_many_lost_verifiers_end_the_request():
    handle, session = scripted([[ActorDiedError()]]), Session("s")
    with pytest.raises(RetriesExhausted):
        asyncio.run(VerifierClient(handle, session, DEAF).prefill((1,)))
    assert len(handle.calls) == replica_clients.MAX_RETRIES + 1


def test_a_cancelled_caller_cancels_the_call():
    handle = scripted([[FOREVER]])

    async def give_up():
        verifier = VerifierClient(handle, Session("s"), DEAF)
        tasks = [
            asyncio.create_task(verifier.verify(VERIFY)),
            asyncio.create_task(collect(verifier.generate(generate_request()))),
            asyncio.create_task(collect(verifier.verify_and_generate(FUSED))),
        ]
        while len(handle.calls) < 3:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())
    assert handle.cancelled == 3


def draft_request(stream_interval=NO_STREAMING):
    return DraftRequest(prompt_token_ids=(1, 2, 3), output_token_ids=(4,), stream_interval=stream_interval)


async def drafted(handle, alive, *, stream_interval=NO_STREAMING, session=None):
    breaker = CircuitBreaker("drafter", alive, BusyTime())
    try:
        drafter = DrafterClient(handle, session or Session("s"), breaker)
        return await collect(drafter.draft(draft_request(stream_interval)))
    finally:
        breaker.close()


def test_whole_drafts_use_a_call_and_windows_use_a_stream():
    complete_drafts = scripted([[TokenDelta((7, 8), finish_reason="stop")]])
    assert asyncio.run(drafted(complete_drafts, scripted([[None]]))) == [TokenDelta((7, 8), finish_reason="stop")]
    assert complete_drafts.calls[0][0] == {"method_name": "draft_complete", "session_id": "s"}
    windows = scripted([[TokenDelta((7,)), TokenDelta((8,), finish_reason="stop")]])
    assert len(asyncio.run(drafted(windows, scripted([[None]]), stream_interval=4))) == 2
    assert windows.calls[0][0] == {"method_name": "draft", "session_id": "s", "stream": True}
    assert windows.calls[0][1] == (draft_request(4),)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(BackPressureError(1, 1), "the drafters are busy"), (ActorDiedError(), "the drafter was lost")],
)
def test_errors_of_a_drafter_raise_draft_unavailable(error, reason):
    for stream_interval in (NO_STREAMING, 4):
        with pytest.raises(DraftUnavailable, match=reason):
            asyncio.run(drafted(scripted([[error]]), scripted([[None]]), stream_interval=stream_interval))


def test_a_drafter_that_hangs_is_skipped_until_it_responds():
    alive = scripted([[None], [None], [FOREVER], [FOREVER], [None]])
    hanging, well = scripted([[FOREVER]]), scripted([[TokenDelta((7,), finish_reason="stop")]])

    async def requests():
        breaker = CircuitBreaker("drafter", alive, BusyTime())
        drafters = {name: DrafterClient(h, Session("s"), breaker) for name, h in (("h", hanging), ("w", well))}
        with pytest.raises(DraftUnavailable, match="the drafter does not answer"):
            await collect(drafters["h"].draft(draft_request()))
        assert hanging.cancelled == 1
        with pytest.raises(DraftUnavailable, match="the drafter does not answer"):
            await collect(drafters["w"].draft(draft_request()))
        assert not well.calls
        while breaker.failure:
            await asyncio.sleep(0.005)
        assert await collect(drafters["w"].draft(draft_request()))
        breaker.close()

    asyncio.run(asyncio.wait_for(requests(), 30))


def test_after_a_drafter_died_there_are_no_drafts_until_one_responds():
    async def requests():
        breaker = CircuitBreaker("drafter", scripted([[None], [ActorDiedError()], [None]]), BusyTime())
        dying = DrafterClient(scripted([[ActorDiedError()], [TokenDelta((7,))]]), Session("s"), breaker)
        with pytest.raises(DraftUnavailable, match="lost"):
            await collect(dying.draft(draft_request()))
        with pytest.raises(DraftUnavailable, match="ActorDiedError"):
            await collect(dying.draft(draft_request()))
        while breaker.failure:
            await asyncio.sleep(0.005)
        assert await collect(dying.draft(draft_request()))
        breaker.close()

    asyncio.run(asyncio.wait_for(requests(), 30))


def test_a_part_whose_calls_succeed_is_available_although_the_health_check_waits():
    async def requests():
        breaker = CircuitBreaker("verifier", scripted([[None], [FOREVER]]), BusyTime())
        verifier = VerifierClient(scripted([[7]]), Session("s"), breaker)
        for _ in range(40):  # four times as long as the timeout of the health check
            assert await verifier.prefill((1,)) == 7
            await asyncio.sleep(0.005)
        assert breaker.failure is None
        while breaker.failure is None:
            await asyncio.sleep(0.005)
        assert breaker.failure == "does not answer"
        breaker.close()

    asyncio.run(asyncio.wait_for(requests(), 30))
