"""The pipeline over scripted models: which calls it makes, what it keeps of a draft, and what happens on failures."""

import asyncio
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from parse.acceptance import Thresholds
from parse.config import VerificationSettings
from parse.controller import DraftingController, DraftingOutcome
from parse.engines.protocol import Capabilities
from parse.errors import RequestError, VerificationError
from parse.events import Finished, TextDelta, Verification
from parse.pipeline import Pipeline
from parse.prefixes import DEFAULT_STRIDE
from parse.prompts import build_verification_suffix
from parse.registry import METHODS, MODES
from parse.requests import GenerationRequest
from parse.types import Logprob, SamplingParams, SpeculationStats, TokenDelta, VerifyResult
from parse.verification_check import without_unreliable_modes

GREEDY = SamplingParams(temperature=0.0)
PROMPT = (1, 2, 3)
RIGHT = list(range(100, 120))  # words of the demo's vocabulary; what they say does not matter here
OWN = list(range(200, 220))
WRONG = 150
CAPABILITIES = Capabilities(
    modes=tuple(MODES),
    speculative_methods=tuple(METHODS),
    sampling_params=frozenset(field.name for field in fields(SamplingParams)),
    max_logprobs=20,
    max_model_len=1000,
    block_size=16,
)


@dataclass
class Target:
    """Considers WRONG wrong and all else right; generates OWN from wherever it begins."""

    tokens: list = field(default_factory=lambda: list(OWN))
    calls: list = field(default_factory=list)
    closed: bool = False

    async def prefill(self, prompt_token_ids, session_key=""):
        self.calls.append(("prefill", tuple(prompt_token_ids)))
        return 0

    async def verify(self, request):
        prompt = (*request.prompt_token_ids, *request.output_token_ids)
        draft, lengths = tuple(request.draft_token_ids), tuple(request.prefix_lengths)
        self.calls.append(("verify", prompt, draft, lengths, request.draft_complete))
        p_correct = tuple(0.01 if WRONG in draft[:length] else 0.99 for length in lengths)
        logprobs = () if request.num_logprobs is None else tuple(Logprob(-float(token)) for token in draft)
        return VerifyResult(p_correct, logprobs)

    async def generate(self, request):
        output, draft, max_tokens = (
            request.output_token_ids,
            request.draft_token_ids,
            request.sampling_params.max_tokens,
        )
        self.calls.append(("generate", tuple(request.prompt_token_ids), tuple(output), max_tokens, tuple(draft)))
        limit = len(self.tokens) if max_tokens is None else max_tokens
        try:
            rest = self.tokens[len(output) : limit]
            accepted = 0
            while accepted < min(len(rest), len(draft)) and rest[accepted] == draft[accepted]:
                accepted += 1
            if accepted:
                yield TokenDelta(tuple(rest[:accepted]), num_accepted=accepted)
            for token in rest[accepted:]:
                await asyncio.sleep(0)
                yield TokenDelta((token,))
            yield TokenDelta((), finish_reason="length" if limit < len(self.tokens) else "stop")
        finally:
            self.closed = True

    async def verify_and_generate(self, request):
        """Two calls, one after the other: what the fused call has to be equivalent to."""
        try:
            result = await self.verify(request.verify)
            yield result
            rest = request.continuation(request.accepted_prefix_length(result))
            if rest is not None:
                async for delta in self.generate(rest):
                    yield delta
        finally:
            self.closed = True


@dataclass
class Scripted:
    """Drafts what it is told to, one script after the other."""

    scripts: list
    ended: bool = True
    outputs: list = field(default_factory=list)
    closed: bool = False

    async def draft(self, request):
        self.outputs.append(tuple(request.output_token_ids))
        interval = request.stream_interval
        try:
            script = self.scripts.pop(0)
            for start in range(0, len(script), interval):
                for part in script[start : start + interval]:
                    if isinstance(part, Exception):
                        raise part
                await asyncio.sleep(0)
                yield TokenDelta(tuple(script[start : start + interval]))
            yield TokenDelta((), finish_reason="stop" if self.ended else "length")
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def make(tokenizer):
    suffix = build_verification_suffix(tokenizer, "Is this right so far?")

    def build(target, drafter, **settings):
        return Pipeline(
            verifier=target,
            capabilities=CAPABILITIES,
            tokenizer=tokenizer,
            suffix=suffix,
            settings=VerificationSettings(stride=4, **settings),
            drafter=drafter,
        )

    return build


def answered(pipeline, mode, params=GREEDY, **fields):
    request = GenerationRequest(PROMPT, sampling_params=params, mode=mode, **fields)

    async def collect():
        return [event async for event in pipeline.generate(request)]

    events = asyncio.run(collect())
    deltas = [e for e in events if isinstance(e, TextDelta)]
    token_ids = [token for delta in deltas for token in delta.token_ids]
    assert isinstance(events[-1], Finished)
    return token_ids, deltas, [e for e in events if isinstance(e, Verification)], events[-1]


def test_a_right_draft_is_the_answer_and_the_target_writes_nothing(make):
    target, drafter = Target(), Scripted([RIGHT])
    token_ids, deltas, verifications, finished = answered(make(target, drafter), "full")
    assert token_ids == RIGHT and {delta.origin for delta in deltas} == {"draft"}
    assert [call[0] for call in target.calls] == ["prefill", "verify"]
    assert target.calls[1] == ("verify", PROMPT, tuple(RIGHT), (4, 8, 12, 16, 20), True)
    assert [(v.accepted_prefix_length, v.rejected_text) for v in verifications] == [(20, "")]
    assert finished.finish_reason == "stop"
    assert (
        finished.usage.draft_tokens,
        finished.usage.accepted_tokens,
        finished.usage.target_tokens,
        finished.usage.accepted_prefix_length,
    ) == (20, 20, 0, 20)


@pytest.mark.parametrize(("wrong_at", "kept"), [(0, 0), (3, 0), (4, 4), (13, 12), (19, 16)])
def test_of_a_wrong_draft_the_last_prefix_before_the_error_stands(make, tokenizer, wrong_at, kept):
    draft = [*RIGHT[:wrong_at], WRONG, *RIGHT[wrong_at + 1 :]]
    target = Target()
    token_ids, _, verifications, finished = answered(make(target, Scripted([draft])), "full")
    assert token_ids == draft[:kept] + OWN[kept:]
    assert verifications[0].accepted_prefix_length == kept and verifications[0].rejected_text == tokenizer.decode(
        draft[kept:]
    )
    assert target.calls[-1][2] == tuple(draft[:kept])
    assert (finished.usage.accepted_tokens, finished.usage.rejected_tokens, finished.usage.target_tokens) == (
        kept,
        20 - kept,
        20 - kept,
    )


def test_the_full_answer_is_asked_about_only_if_the_draft_ended_by_itself(make):
    target = Target()
    token_ids, _, _, finished = answered(make(target, Scripted([RIGHT[:10]], ended=False)), "full")
    assert target.calls[1] == ("verify", PROMPT, tuple(RIGHT[:10]), (4, 8), False)
    assert token_ids == RIGHT[:8] + OWN[8:] and finished.usage.accepted_tokens == 8


@pytest.mark.parametrize("stride, of_engine, expected", [(5, 7, 5), (None, 7, 7), (None, None, DEFAULT_STRIDE)])
def test_the_engine_chooses_the_stride_if_no_setting_does(make, stride, of_engine, expected):
    target = Target()
    pipeline = make(target, Scripted([RIGHT]))
    pipeline = replace(
        pipeline,
        capabilities=replace(CAPABILITIES, stride=of_engine),
        settings=pipeline.settings.model_copy(update={"stride": stride}),
    )
    answered(pipeline, "full")
    assert target.calls[1][3] == (*range(expected, 20, expected), 20)


def test_thresholds_of_the_request_count(make):
    token_ids, _, _, _ = answered(make(Target(), Scripted([RIGHT])), "full", thresholds=Thresholds(1.0, 1.0))
    assert token_ids == OWN


def test_the_target_reads_the_prompt_while_the_drafter_writes(make):
    target = Target()
    order = []

    class Slow(Scripted):
        async def draft(self, request):
            async for delta in super().draft(request):
                order.append([call[0] for call in target.calls])
                yield delta

    answered(make(target, Slow([RIGHT])), "full")
    assert order[-1] == ["prefill"]


def test_an_engine_that_wants_it_prefills_the_draft_while_it_is_written(make):
    target, drafter = Target(), Scripted([RIGHT])
    pipeline = make(target, drafter)
    pipeline = replace(pipeline, capabilities=replace(CAPABILITIES, prefill_interval=8))
    token_ids, _, _, _ = answered(pipeline, "full")
    assert token_ids == RIGHT
    prefilled = [tokens for name, tokens, *_ in target.calls if name == "prefill"]
    assert prefilled[0] == PROMPT
    assert prefilled[1:] == [(*PROMPT, *RIGHT[:length]) for length in (8, 16)]


def test_all_calls_of_a_request_have_its_session_key(make):
    keys = []

    class Keys(Target):
        async def prefill(self, prompt_token_ids, session_key=""):
            keys.append(session_key)
            return 0

        async def verify_and_generate(self, request):
            keys.append(request.verify.session_key)
            continuation = request.continuation(0)
            keys.append(continuation.session_key)
            async for item in super().verify_and_generate(request):
                yield item

    answered(make(Keys(), Scripted([RIGHT])), "full", session_key="conversation")
    assert keys == ["conversation"] * 3
    keys.clear()
    answered(make(Keys(), Scripted([RIGHT])), "full")
    assert len(set(keys)) == 1 and keys[0]  # the beginning of the prompt


@pytest.mark.parametrize("params", [{"presence_penalty": 1.0}, {"frequency_penalty": 1.0}])
@pytest.mark.parametrize("mode", ["full", "rounds", "progressive", "exact", "auto"])
def test_a_draft_is_not_used_if_the_engine_could_not_continue_it(make, mode, params):
    drafter = Scripted([RIGHT])
    pipeline = make(Target(), drafter)
    pipeline = replace(pipeline, capabilities=replace(CAPABILITIES, continues_with_penalties=False))
    token_ids, _, _, finished = answered(pipeline, mode, replace(GREEDY, **params))
    assert token_ids == OWN and not drafter.outputs
    assert finished.usage.fallback.cause == "unsupported"


def test_off_leaves_the_drafter_alone(make):
    drafter = Scripted([RIGHT])
    token_ids, deltas, verifications, finished = answered(make(Target(), drafter), "off")
    assert token_ids == OWN and not drafter.outputs and not verifications
    assert {delta.origin for delta in deltas} == {"target"} and finished.usage.draft_tokens == 0


def test_a_token_limit_shortens_the_draft_before_it_is_verified(make):
    target = Target()
    token_ids, _, _, finished = answered(make(target, Scripted([RIGHT])), "full", replace(GREEDY, max_tokens=9))
    assert target.calls[1] == ("verify", PROMPT, tuple(RIGHT[:9]), (4, 8), False)
    assert token_ids == [*RIGHT[:8], OWN[8]] and finished.finish_reason == "length"


def test_a_limit_that_the_accepted_draft_reaches_ends_the_answer(make):
    target = Target()
    token_ids, _, _, finished = answered(make(target, Scripted([RIGHT])), "full", replace(GREEDY, max_tokens=20))
    assert token_ids == RIGHT and finished.finish_reason == "stop"
    assert "generate" not in [call[0] for call in target.calls]


def test_a_stop_string_shortens_the_draft_before_it_is_verified(make, tokenizer):
    text = "Step 1: 27 minus 3 makes 24."
    draft = tokenizer.encode(text)
    stop = " minus 3 ma"  # begins and ends amid tokens
    before = len(tokenizer.encode("Step 1: 27"))
    target = Target()
    token_ids, deltas, _, finished = answered(make(target, Scripted([draft])), "full", replace(GREEDY, stop=(stop,)))
    assert target.calls[1][2] == tuple(draft[:before])
    assert "".join(delta.text for delta in deltas) == "Step 1: 27" and token_ids == draft[:before]
    assert finished.finish_reason == "stop" and "generate" not in [call[0] for call in target.calls]


def test_text_before_a_stop_string_that_begins_within_a_token_is_not_lost(make, tokenizer):
    draft = tokenizer.encode("Step 1: 27 minus 3")
    _, deltas, _, _ = answered(make(Target(), Scripted([draft])), "full", replace(GREEDY, stop=("nus",)))
    assert "".join(delta.text for delta in deltas) == "Step 1: 27 mi"


def test_log_probabilities_of_accepted_tokens_are_the_targets(make):
    _, deltas, _, _ = answered(make(Target(), Scripted([RIGHT])), "full", replace(GREEDY, logprobs=0))
    assert [lp.logprob for delta in deltas for lp in delta.logprobs] == [-float(token) for token in RIGHT]


def test_progressive_verifies_what_is_there_while_the_rest_is_drafted(make):
    """Accepted text flows before the draft is finished."""
    shown = asyncio.Event()

    class Waiting(Scripted):
        async def draft(self, request):
            yield TokenDelta(tuple(RIGHT[:12]))
            await asyncio.wait_for(shown.wait(), 5)
            yield TokenDelta(tuple(RIGHT[12:]), finish_reason="stop")

    async def collect():
        token_ids: list[int] = []
        async for event in make(Target(), Waiting([]), window=8).generate(
            GenerationRequest(PROMPT, sampling_params=GREEDY, mode="progressive")
        ):
            if isinstance(event, TextDelta):
                token_ids += event.token_ids
                shown.set()
        return token_ids

    assert asyncio.run(collect()) == RIGHT


def test_in_progressive_a_failed_window_ends_the_draft(make):
    draft = [*RIGHT[:9], WRONG, *RIGHT[10:], *RIGHT * 20]
    target, drafter = Target(), Scripted([draft])
    token_ids, _, verifications, finished = answered(make(target, drafter, window=4), "progressive")
    assert token_ids == RIGHT[:8] + OWN[8:]
    assert drafter.closed and finished.usage.draft_tokens < len(draft) / 2
    assert (
        verifications[-1].rejected_text
        and sum(v.accepted_prefix_length for v in verifications) == finished.usage.accepted_tokens == 8
    )
    assert finished.usage.accepted_prefix_length == 8
    windows = [call for call in target.calls if call[0] == "verify"]
    assert all(call[4] is False for call in windows)  # never asked about a full answer: it was not there


def test_progressive_asks_each_cut_once_and_the_full_answer_last(make):
    target = Target()
    token_ids, _, _, finished = answered(make(target, Scripted([RIGHT]), window=8), "progressive")
    lengths = [length for call in target.calls if call[0] == "verify" for length in call[3]]
    assert token_ids == RIGHT and lengths == [4, 8, 12, 16, 20] and finished.finish_reason == "stop"
    assert target.calls[-1][4] is True
    assert finished.usage.accepted_prefix_length == 20


def test_each_window_of_progressive_is_twice_as_long_as_the_one_before(make):
    target = Target()
    answered(make(target, Scripted([RIGHT * 2]), window=4), "progressive")
    windows = [call[3] for call in target.calls if call[0] == "verify"]
    assert windows == [(4,), (8, 12), (16, 20, 24, 28), (32, 36, 40)]


def test_progressive_reports_no_accepted_prefix_if_the_first_window_fails(make):
    *_, finished = answered(make(Target(), Scripted([[WRONG] * 20]), window=8), "progressive")
    assert finished.usage.accepted_prefix_length == finished.usage.accepted_tokens == 0


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
@pytest.mark.parametrize(
    ("boundaries", "which"),
    [
        (("lines",), [1, 2]),
        (("sentences",), [0, 1, 2]),
        (("lines", "sentences"), [0, 1, 2]),
    ],
)
def test_prefixes_end_at_the_configured_boundaries(make, tokenizer, mode, boundaries, which):
    parts = ["Step 1: 27 minus 3 makes 24.", " Step 2: 24 plus 5 makes 29.\n", "Step 3: 29 plus 2 makes 31.\n", "So 31"]
    draft, part_ends = [], []
    for part in parts:
        draft += tokenizer.encode(part)
        part_ends.append(len(draft))
    target = Target()
    token_ids, *_ = answered(make(target, Scripted([draft]), prefix_boundaries=boundaries), mode)
    lengths = [length for call in target.calls if call[0] == "verify" for length in call[3]]
    assert token_ids == draft
    assert lengths == [*(part_ends[index] for index in which), len(draft)]


def test_rounds_hands_the_pen_back_after_a_correction(make):
    first = [*RIGHT[:5], WRONG, *RIGHT[6:]]
    target, drafter = Target(), Scripted([first, RIGHT[7:]])
    token_ids, _, verifications, finished = answered(make(target, drafter, correction_tokens=3), "rounds")
    assert drafter.outputs == [(), (*RIGHT[:4], *OWN[4:7])]
    assert token_ids == RIGHT[:4] + OWN[4:7] + RIGHT[7:]
    assert [v.start for v in verifications] == [0, 7] and finished.finish_reason == "stop"
    assert (finished.usage.rounds, finished.usage.target_tokens, finished.usage.accepted_prefix_length) == (2, 3, 4)


def test_rounds_ends_after_the_rounds_it_may_have(make):
    wrong = [WRONG] * 20
    drafter = Scripted([wrong] * 9)
    token_ids, _, _, finished = answered(make(Target(), drafter, correction_tokens=2, max_rounds=3), "rounds")
    assert token_ids == OWN and finished.usage.rounds == 3 == len(drafter.outputs)


@pytest.mark.parametrize(
    ("draft", "accepted", "limits"),
    [
        # The draft is shorter than a correction, so the target generates the rest at once.
        ([*RIGHT[:5], WRONG], 4, [CAPABILITIES.max_model_len - len(PROMPT)]),
        # A correction after 16 of 20 tokens is expected to reach the end of the answer.
        ([*RIGHT[:17], WRONG, *RIGHT[18:]], 16, [24, CAPABILITIES.max_model_len - len(PROMPT)]),
    ],
    ids=["short draft", "late error"],
)
def test_rounds_drafts_again_only_if_more_than_a_correction_is_missing(make, draft, accepted, limits):
    target, drafter = Target(tokens=OWN + OWN), Scripted([draft, RIGHT])
    token_ids, _, _, finished = answered(make(target, drafter, correction_tokens=8), "rounds")
    assert drafter.outputs == [()] and finished.usage.rounds == 1
    assert token_ids == RIGHT[:accepted] + (OWN + OWN)[accepted:]
    assert [call[3] for call in target.calls if call[0] == "generate"] == limits


def test_the_rest_of_a_prediction_after_a_correction_is_not_a_complete_answer(make):
    target = Target()
    prediction = [*RIGHT[:5], WRONG, *RIGHT[6:]]
    token_ids, *_ = answered(make(target, None, correction_tokens=3), "rounds", prediction=prediction)
    verified = [(call[2], call[4]) for call in target.calls if call[0] == "verify"]
    assert verified == [(tuple(prediction), True), (tuple(prediction[7:]), False)]
    assert token_ids == RIGHT[:4] + OWN[4:7] + RIGHT[7:19] + OWN[19:]


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_a_prediction_beyond_the_token_limit_is_not_a_complete_answer(make, mode):
    target, params = Target(), replace(GREEDY, max_tokens=8)
    token_ids, _, _, finished = answered(make(target, None), mode, params, prediction=RIGHT)
    assert not any(call[4] for call in target.calls if call[0] == "verify")
    assert token_ids == [*RIGHT[:4], *OWN[4:8]] and finished.finish_reason == "length"
    assert finished.usage.accepted_prefix_length == 4


def test_a_correction_may_end_the_answer(make):
    target = Target(tokens=OWN[:6])
    token_ids, _, _, finished = answered(
        make(target, Scripted([[*RIGHT[:5], WRONG, *RIGHT]]), correction_tokens=8), "rounds"
    )
    assert token_ids == RIGHT[:4] + OWN[4:6] and finished.finish_reason == "stop" and finished.usage.rounds == 1


def test_exact_proposes_the_draft_and_takes_what_the_target_says(make):
    target = Target()
    draft = [*OWN[:6], WRONG]
    token_ids, deltas, verifications, finished = answered(make(target, Scripted([draft])), "exact")
    assert token_ids == OWN and not verifications
    assert target.calls[-1][4] == tuple(draft)
    assert [d.token_ids for d in deltas if d.origin == "draft"] == [tuple(OWN[:6])]
    assert (finished.usage.accepted_tokens, finished.usage.rejected_tokens, finished.usage.target_tokens) == (6, 1, 14)
    assert finished.usage.accepted_prefix_length == 6
    *_, finished = answered(make(Target(), Scripted([RIGHT])), "exact")
    assert finished.usage.accepted_prefix_length == 0


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
@pytest.mark.parametrize("fault", [ConnectionError("gone"), RequestError("prompt", "too long")])
def test_a_drafter_that_fails_costs_only_speed(make, mode, fault):
    token_ids, _, _, finished = answered(make(Target(), Scripted([[fault]])), mode)
    assert token_ids == OWN and finished.finish_reason == "stop"
    assert str(fault) in finished.usage.fallback.message


def test_what_a_failing_drafter_has_drafted_is_verified_like_any_prefix(make):
    draft = [*RIGHT[:9], ConnectionError("gone")]
    target = Target()
    token_ids, _, _, _ = answered(make(target, Scripted([draft])), "progressive")
    assert token_ids == RIGHT[:4] + OWN[4:]  # eight tokens had come, and at their end there is no cut


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_an_empty_draft_is_no_draft(make, mode):
    token_ids, _, _, finished = answered(make(Target(), Scripted([[]])), mode)
    assert token_ids == OWN and finished.usage.draft_tokens == 0
    assert finished.usage.accepted_prefix_length is None


def test_without_a_drafter_the_target_answers_and_says_why(make):
    token_ids, _, _, finished = answered(make(Target(), None), "full")
    assert token_ids == OWN and finished.usage.mode == "off" and finished.usage.fallback.cause == "none_there"


def test_the_callers_own_draft_takes_the_drafters_place(make):
    drafter = Scripted([])
    pipeline = make(Target(), drafter)
    before = vars(pipeline.controller).copy()
    for mode in ("full", "auto", "auto", "auto"):  # the controller ignores its first outcome
        token_ids, _, _, finished = answered(pipeline, mode, prediction=RIGHT)
        assert token_ids == RIGHT and not drafter.outputs and finished.usage.accepted_tokens == 20
    assert vars(pipeline.controller) == before  # a prediction says nothing about the drafter


@pytest.mark.parametrize(
    "choice",
    [
        dict(mode="exact"),
        dict(mode="full"),
        dict(mode="rounds"),
        dict(mode="auto", thresholds=Thresholds(1.0, 1.0)),
        dict(mode="auto", speculative_method="none"),
    ],
    ids=str,
)
def test_what_one_client_chooses_does_not_teach_the_controller_of_all(make, choice):
    pipeline = make(Target(), Scripted([RIGHT] * 100))
    before = vars(pipeline.controller).copy()
    for _ in range(30):
        _, _, _, finished = answered(pipeline, **choice)
        assert finished.usage.draft_tokens
    assert vars(pipeline.controller) == before
    answered(pipeline, "auto")
    assert vars(pipeline.controller) != before


def test_a_verifiers_error_reaches_the_caller(make):
    class Broken(Target):
        async def verify(self, *args, **kwargs):
            raise RuntimeError("the verifier is gone")

    with pytest.raises(RuntimeError, match="the verifier is gone"):
        answered(make(Broken(), Scripted([RIGHT])), "full")


@pytest.mark.parametrize("mode", ["off", "full", "progressive"])
def test_a_caller_who_leaves_closes_everything(make, mode):
    target, drafter = Target(), Scripted([[*RIGHT[:4], WRONG, *RIGHT * 50]])

    async def leave():
        events = make(target, drafter, window=4).generate(GenerationRequest(PROMPT, sampling_params=GREEDY, mode=mode))
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await events.aclose()
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(leave()) == []
    assert target.closed or mode == "progressive"
    assert drafter.closed or mode == "off"


def test_auto_stops_drafting_that_does_not_pay_and_says_so(make):
    class Patient(Target):
        async def verify(self, *args, **kwargs):
            await asyncio.sleep(0.01)
            return await super().verify(*args, **kwargs)

    drafter = Scripted([[WRONG] * 20] * 50)
    pipeline = make(Patient(), drafter)
    seen = [answered(pipeline, "auto")[3].usage for _ in range(12)]
    assert [usage.mode for usage in seen[:3]] == ["full"] * 3
    assert [usage.mode for usage in seen[3:11]] == ["off"] * 8
    assert seen[3].fallback.cause == "does_not_pay" and "0% acceptance" in seen[3].fallback.message
    assert seen[11].mode == "full"  # a trial


@pytest.mark.parametrize(
    ("default_method", "choice", "setting", "mode"),
    [
        ((), None, None, "rounds"),
        (("ngram",), None, None, "full"),
        (("ngram",), "none", None, "rounds"),
        ((), None, "progressive", "progressive"),
        (("ngram",), None, "progressive", "progressive"),
    ],
)
@pytest.mark.parametrize("source", [{}, {"prediction": RIGHT}], ids=["drafted", "predicted"])
def test_the_mode_of_auto_depends_on_the_setting_and_the_method(make, default_method, choice, setting, mode, source):
    pipeline = make(Target(), Scripted([RIGHT]), auto_mode=setting)
    pipeline = replace(pipeline, capabilities=replace(CAPABILITIES, speculative_methods=default_method))
    assert answered(pipeline, "auto", speculative_method=choice, **source)[3].usage.mode == mode


@pytest.mark.parametrize(
    ("modes", "mode"),
    [({"off", "progressive"}, "progressive"), ({"off", "full", "progressive"}, "full"), ({"off"}, "off")],
)
def test_auto_uses_a_mode_that_the_engine_offers(make, modes, mode):
    pipeline = make(Target(), Scripted([RIGHT]))
    pipeline = replace(pipeline, capabilities=replace(CAPABILITIES, modes=tuple(sorted(modes))))
    assert answered(pipeline, "auto")[3].usage.mode == mode


@pytest.mark.parametrize("mode", ["full", "rounds", "progressive"])
def test_what_drafts_of_other_requests_cost_does_not_change_an_answer(make, mode):
    def answer(controller):
        drafter = Scripted([[*RIGHT[:6], WRONG, *RIGHT[7:]] for _ in range(3)])
        pipeline = replace(make(Target(), drafter, correction_tokens=2), controller=controller)
        token_ids, _, verifications, finished = answered(pipeline, mode)
        return token_ids, [verification.accepted_prefix_length for verification in verifications], finished.usage.rounds

    discouraged = DraftingController()
    for _ in range(30):
        discouraged.record(
            DraftingOutcome(draft_tokens=100, accepted_tokens=0, target_tokens=100, total_s=9.0, target_s=1.0)
        )
    assert answer(discouraged) == answer(DraftingController())


@pytest.mark.parametrize("mode", ["rounds", "progressive"])
def test_a_drafter_that_fails_after_an_accepted_part_is_no_fallback(make, mode):
    """The fallback says why the target answered alone, and here it did not."""
    scripts: dict[str, list[list[Any]]] = {
        "rounds": [[*RIGHT[:8], WRONG, *RIGHT[:9]], [RuntimeError("gone")]],
        "progressive": [[*RIGHT[:9], RuntimeError("gone")]],
    }
    pipeline = make(Target(), Scripted(scripts[mode]), window=4, correction_tokens=2)
    token_ids, _, _, finished = answered(pipeline, mode)
    accepted = {"rounds": 8, "progressive": 4}[mode]
    assert token_ids == RIGHT[:accepted] + OWN[accepted:] and finished.usage.accepted_tokens == accepted
    assert finished.usage.fallback is None


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
@pytest.mark.parametrize("nonsense", [5000, -1, "a", 1.5, None])
def test_nonsense_of_the_drafter_costs_only_its_draft(make, mode, nonsense):
    token_ids, _, _, finished = answered(make(Target(), Scripted([[nonsense]])), mode)
    assert token_ids == OWN and finished.usage.accepted_tokens == 0 and "no draft" in str(finished.usage.fallback)


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_a_drafter_that_hangs_or_is_cancelled_by_others_costs_only_its_draft(make, mode):
    class Hanging:
        async def draft(self, request):
            await asyncio.sleep(1000)
            yield TokenDelta(())

    class Gone:
        async def draft(self, request):
            raise asyncio.CancelledError
            yield TokenDelta(())

    for drafter, why in ((Hanging(), "longer than 0.05 s"), (Gone(), "cancelled")):
        token_ids, _, _, finished = answered(make(Target(), drafter, draft_timeout_s=0.05), mode)
        assert token_ids == OWN and why in str(finished.usage.fallback)


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_a_draft_ends_at_the_first_token_that_is_no_text(make, tokenizer, mode):
    token_ids, _, _, finished = answered(
        make(Target(), Scripted([[*RIGHT, tokenizer.eos_token_id, *RIGHT]], ended=False)), mode
    )
    assert token_ids == RIGHT and finished.finish_reason == "stop"
    token_ids, _, _, _ = answered(make(Target(), Scripted([[tokenizer.eos_token_id]])), mode)
    assert token_ids == OWN


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_only_an_end_token_of_the_target_completes_a_draft(make, tokenizer, mode):
    end, user = 160, tokenizer.convert_tokens_to_ids("<|user|>")  # the target has an end token that is not special
    for token, is_complete in ((end, True), (user, False)):
        for source in ({}, {"prediction": [*RIGHT[:9], token, *RIGHT]}):
            target = Target()
            pipeline = make(target, Scripted([[*RIGHT[:9], token, *RIGHT], [], []]))
            pipeline = replace(pipeline, capabilities=replace(CAPABILITIES, eos_token_ids=frozenset((end,))))
            token_ids, _, _, finished = answered(pipeline, mode, **source)
            assert token_ids == (RIGHT[:9] if is_complete else RIGHT[:8] + OWN[8:]), (token, source)
            assert finished.usage.draft_tokens == 9 and finished.usage.fallback is None
            verified = [call for call in target.calls if call[0] == "verify"]
            assert [call[4] for call in verified] == [is_complete]


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_with_ignore_eos_the_target_continues_after_an_accepted_draft(make, tokenizer, mode):
    params = replace(GREEDY, ignore_eos=True, max_tokens=15)
    drafts = [RIGHT[:9], [*RIGHT[:9], tokenizer.eos_token_id, *RIGHT]]
    for draft in drafts:
        for source in ({}, {"prediction": draft}):
            target, drafter = Target(), Scripted([draft, [], []])
            token_ids, _, _, finished = answered(make(target, drafter), mode, params, **source)
            assert token_ids == RIGHT[:8] + OWN[8:15] and finished.finish_reason == "length"
            assert not any(call[4] for call in target.calls if call[0] == "verify")


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_with_ignore_eos_a_stop_string_still_ends_the_answer(make, tokenizer, mode):
    draft = tokenizer.encode("Step 1: 27 minus 3 makes 24.")
    params = replace(GREEDY, ignore_eos=True, stop=(" makes",))
    _, deltas, _, finished = answered(make(Target(), Scripted([draft])), mode, params)
    assert "".join(delta.text for delta in deltas) == "Step 1: 27 minus 3" and finished.finish_reason == "stop"


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_a_draft_below_the_minimum_length_is_continued(make, tokenizer, mode):
    params = replace(GREEDY, min_tokens=10, max_tokens=15)
    for draft in (RIGHT[:9], [*RIGHT[:9], tokenizer.eos_token_id, *RIGHT]):
        for source in ({}, {"prediction": draft}):
            target, drafter = Target(), Scripted([draft, [], []])
            token_ids, *_ = answered(make(target, drafter), mode, params, **source)
            assert token_ids == RIGHT[:8] + OWN[8:15]
            assert not any(call[4] for call in target.calls if call[0] == "verify")


def test_a_minimum_length_beyond_a_correction_is_no_error(make):
    """Between two drafts, the target generates only a few tokens."""
    draft = [*RIGHT[:9], *[WRONG] * 30]
    params = replace(GREEDY, min_tokens=60, max_tokens=80)
    target = Target(tokens=OWN * 5)
    token_ids, _, _, finished = answered(make(target, Scripted([draft] * 9)), "rounds", params)
    assert len(token_ids) >= 60 and finished.usage.rounds > 1


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_completes_a_draft(make, mode, include):
    params = replace(GREEDY, stop_token_ids=(RIGHT[9],), include_stop_str_in_output=include, ignore_eos=True)
    for source in ({}, {"prediction": RIGHT}):
        target = Target()
        token_ids, _, _, finished = answered(make(target, Scripted([RIGHT])), mode, params, **source)
        assert token_ids == RIGHT[: 9 + include] and finished.finish_reason == "stop"
        assert [call[4] for call in target.calls if call[0] == "verify"][-1]


def test_a_drafter_knows_the_token_limit_and_ends_its_draft_at_an_end_token(make):
    received = []

    class Recording(Scripted):
        async def draft(self, request):
            received.append(request.sampling_params)
            async for delta in super().draft(request):
                yield delta

    for max_tokens in (None, 7, 5000):
        params = replace(GREEDY, ignore_eos=True, max_tokens=max_tokens)
        answered(make(Target(), Recording([RIGHT])), "full", params)
    limits = [CAPABILITIES.max_model_len - len(PROMPT), 7, CAPABILITIES.max_model_len - len(PROMPT)]
    assert [params.max_tokens for params in received] == limits
    assert not any(params.ignore_eos for params in received)


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_a_draft_is_no_longer_than_what_the_verifier_takes(make, mode):
    target = Target()
    pipeline = replace(
        make(target, Scripted([RIGHT, RIGHT, RIGHT])), capabilities=replace(CAPABILITIES, max_model_len=len(PROMPT) + 9)
    )
    token_ids, *_ = answered(pipeline, mode)
    assert token_ids[:8] == RIGHT[:8]
    assert max(len(call[1]) + len(call[2]) for call in target.calls if call[0] == "verify") == len(PROMPT) + 9


@pytest.mark.parametrize("stream_interval", [1, 4, 1 << 30])
@pytest.mark.parametrize("first", range(2, 18, 3))
def test_a_stop_string_may_begin_in_one_delta_of_a_draft_and_end_in_the_next(make, tokenizer, first, stream_interval):
    words = [tokenizer.encode(f" {number}")[0] for number in range(10, 30)]
    assert len(words) == 20
    stop = tokenizer.decode(words[first : first + 2])[1:]
    pipeline = make(Target(), Scripted([words]))
    settings = pipeline.settings.model_copy(update={"window": 4, "stride": min(stream_interval, 4)})
    pipeline = replace(pipeline, settings=settings)
    _, deltas, _, finished = answered(pipeline, "progressive", SamplingParams(temperature=0.0, stop=(stop,)))
    full_text = tokenizer.decode(words)
    assert (
        "".join(delta.text for delta in deltas) == full_text[: full_text.index(stop)]
        and finished.finish_reason == "stop"
    )


@pytest.mark.parametrize(
    "result",
    [
        VerifyResult((0.99,)),
        VerifyResult((0.0,) * 5 + (1.0,)),
        VerifyResult(()),
        VerifyResult((7.0,) * 5),
        VerifyResult((float("nan"),) * 5),
        VerifyResult((0.99,) * 5),  # without the log-probabilities
    ],
)
def test_a_result_that_does_not_fit_is_an_error_and_accepts_nothing(make, result):
    class Slipping(Target):
        async def verify(self, *_, **__):
            return result

    with pytest.raises(VerificationError):
        answered(make(Slipping(), Scripted([RIGHT])), "full", SamplingParams(temperature=0.0, logprobs=0))


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_who_leaves_leaves_nothing_running(make, mode):
    class Slow(Target):
        async def prefill(self, prompt_token_ids, session_key=""):
            await asyncio.sleep(1000)

    class Hanging:
        async def draft(self, request):
            await asyncio.sleep(1000)
            yield TokenDelta(())

    async def leave():
        pipeline = make(Slow(), Hanging())
        first_event = asyncio.create_task(anext(pipeline.generate(GenerationRequest(PROMPT, mode=mode))))
        await asyncio.sleep(0.01)
        first_event.cancel()
        await asyncio.gather(first_event, return_exceptions=True)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(leave()) == set()


@pytest.mark.parametrize("prediction", [[5000], [-1], ["a"], [1.5]])
def test_a_prediction_that_is_none_is_refused_by_name(make, prediction):
    for mode in ("full", "progressive", "rounds", "exact"):
        with pytest.raises(RequestError, match="prediction: "):
            answered(make(Target(), None), mode, prediction=prediction)


def test_a_mode_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match=r"mode: must be one of auto, full.*got 'ful'"):
        GenerationRequest(PROMPT, mode="ful")


@dataclass
class Speculating(Target):
    """Says of each delta that it came from a pass with two tokens proposed, of which the first was accepted."""

    methods: list = field(default_factory=list)

    async def generate(self, request):
        self.methods.append(request.speculative_method)
        stats = SpeculationStats(request.speculative_method or "parallel", 1, (1, 1), (1, 0))
        async for delta in super().generate(request):
            yield replace(delta, speculation=stats)


@pytest.mark.parametrize("choice", [None, "eagle3"])
def test_the_question_s_choice_is_asked_for_each_time_the_target_writes_and_what_came_of_it_adds_up(make, choice):
    target, drafter = Speculating(), Scripted([[*RIGHT[:5], WRONG, *RIGHT[6:]], [WRONG] * 20])
    token_ids, _, _, finished = answered(
        make(target, drafter, correction_tokens=3, max_rounds=2), "rounds", speculative_method=choice
    )
    assert token_ids == RIGHT[:4] + OWN[4:]
    assert target.methods == [choice] * 2  # a correction, and what follows the last round
    passes = 16 + 2  # one for each token, and one for the end of each time
    assert finished.usage.speculation == SpeculationStats(choice or "parallel", passes, (passes, passes), (passes, 0))
    assert finished.usage.decoded_tokens == finished.usage.target_tokens == 16


def test_in_exact_what_stands_of_the_draft_came_of_the_target_s_passes_too(make):
    *_, finished = answered(make(Speculating(), Scripted([[*OWN[:6], WRONG]])), "exact")
    assert (finished.usage.target_tokens, finished.usage.decoded_tokens) == (14, 20)


def test_where_the_target_writes_nothing_or_token_by_token_nothing_was_speculated(make):
    for target, mode in ((Speculating(), "full"), (Target(), "off")):
        *_, finished = answered(make(target, Scripted([RIGHT])), mode)
        assert finished.usage.speculation is None


def test_a_method_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match=r"speculation: must be one of draft_model, .*none, got 'eagle'"):
        GenerationRequest(PROMPT, speculative_method="eagle")


def test_stages_tell_when_each_thing_was_done_and_how_much_of_the_prompt_was_known(make):
    @dataclass
    class Remembering(Target):
        async def prefill(self, prompt_token_ids, session_key=""):
            await super().prefill(prompt_token_ids, session_key)
            return 2

        async def verify(self, *args, **kwargs):
            return replace(await super().verify(*args, **kwargs), num_cached_tokens=len(PROMPT) + 5)

    draft = [*RIGHT[:10], WRONG, *RIGHT[11:]]
    for prefills, cached in ((True, 2), (False, len(PROMPT))):
        pipeline = replace(make(Remembering(), Scripted([draft])), prefill_while_drafting=prefills)
        *_, finished = answered(pipeline, "full")
        usage = finished.usage
        stages = {stage.name: stage for stage in usage.stages}
        assert list(stages) == (["warm"] if prefills else []) + ["draft", "judge", "write"]
        assert 0 <= stages["draft"].start <= stages["draft"].end <= stages["judge"].start <= stages["judge"].end
        assert stages["judge"].end <= stages["write"].start <= stages["write"].end <= usage.total_s
        assert usage.seconds("judge", "write") == usage.seconds("judge") + usage.seconds("write") > 0
        assert usage.cached_tokens == cached


class Thinking(Target):
    """Begins its answers with reasoning."""

    def __init__(self, tokenizer, text):
        super().__init__(tokens=tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture
def thinking(make, tokenizer):
    """A pipeline whose chat template opens a reasoning block."""
    reasoning_tokenizer = deepcopy(tokenizer)
    reasoning_tokenizer.chat_template += "{# <think></think> #}"
    target, drafter = Thinking(tokenizer, "<think>First Uma, then Max.</think>Uma leads."), Scripted([RIGHT] * 9)
    return replace(make(target, drafter), tokenizer=reasoning_tokenizer), drafter


@pytest.mark.parametrize("mode", ["full", "rounds", "progressive", "auto"])
@pytest.mark.parametrize("state", ["open", "expected"])
def test_reasoning_is_not_drafted_and_returned_apart_from_the_answer(thinking, mode, state):
    pipeline, drafter = thinking
    _, deltas, verifications, finished = answered(pipeline, mode, reasoning=state)
    if state == "expected":
        assert "".join(delta.reasoning for delta in deltas) == "First Uma, then Max."
        assert "".join(delta.text for delta in deltas) == "Uma leads."
    assert finished.usage.mode == "off" and finished.usage.fallback.cause == "reasoning"
    assert not drafter.outputs and not verifications


def test_exact_drafts_reasoning_too(thinking):
    pipeline, drafter = thinking
    _, _, _, finished = answered(pipeline, "exact", reasoning="expected")
    assert drafter.outputs and finished.usage.mode == "exact" and finished.usage.fallback is None


def test_the_text_of_a_request_without_a_chat_is_not_separated(thinking):
    pipeline, _ = thinking
    _, deltas, _, _ = answered(pipeline, "off")
    assert "".join(delta.text for delta in deltas).startswith("<think>First Uma")
    assert not any(delta.reasoning for delta in deltas)


@pytest.mark.parametrize("mode", ["full", "rounds", "progressive"])
def test_a_draft_whose_answer_words_are_improbable_is_rejected_and_reported(make, mode):
    class Elsewhere(Target):
        """Would reply to the verification prompt with something else."""

        async def verify(self, request):
            result = await super().verify(request)
            masses = tuple(0.01 for _ in result.p_correct)
            return replace(result, p_correct=tuple(0.0 for _ in masses), answer_mass=masses)

    token_ids, _, verifications, finished = answered(make(Elsewhere(), Scripted([RIGHT] * 9)), mode)
    assert token_ids == OWN and finished.usage.answer_mass == 0.01
    assert finished.usage.fallback.cause == "unreliable" and "1.0%" in finished.usage.fallback.message
    assert all(set(verification.answer_mass) == {0.01} for verification in verifications)


def test_a_target_that_cannot_verify_offers_no_mode_that_verifies(make):
    capabilities = without_unreliable_modes(CAPABILITIES, 0.01, VerificationSettings(), "model")
    assert set(capabilities.modes) == {"auto", "exact", "off"}
    assert without_unreliable_modes(CAPABILITIES, 0.9, VerificationSettings(), "model") is CAPABILITIES
    pipeline = replace(make(Target(), Scripted([RIGHT])), capabilities=capabilities)
    token_ids, _, _, finished = answered(pipeline, "auto")
    assert token_ids == OWN and finished.usage.fallback.cause == "unreliable"
    with pytest.raises(RequestError, match=r"^mode: this engine supports"):
        answered(pipeline, "full")
