"""The method over scripted models: what is asked of whom, what stands of a draft, and what goes wrong."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from parse.acceptance import Thresholds
from parse.config import VerificationSettings
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix
from parse.protocol import Finished, GenerationRequest, TextDelta, Verification
from parse.types import (
    Logprob,
    RequestError,
    SamplingParams,
    SpeculationStats,
    TokenDelta,
    VerificationError,
    VerifyResult,
)

GREEDY = SamplingParams(temperature=0.0)
PROMPT = (1, 2, 3)
RIGHT = list(range(100, 120))  # words of the demo's vocabulary; what they say does not matter here
OWN = list(range(200, 220))
WRONG = 150


@dataclass
class Target:
    """Holds WRONG to be wrong and all else right; writes OWN from wherever it begins."""

    tokens: list = field(default_factory=lambda: list(OWN))
    calls: list = field(default_factory=list)
    closed: bool = False

    async def warm(self, prompt):
        self.calls.append(("warm", tuple(prompt)))
        return 0

    async def judge(self, prompt, draft, cuts, check, *, full=None, prefix=None, logprobs=None):
        self.calls.append(("judge", tuple(prompt), tuple(draft), tuple(cuts), full))
        correct = tuple(0.01 if WRONG in draft[:cut] else 0.99 for cut in cuts)
        return VerifyResult(correct, tuple(Logprob(-float(token)) for token in draft) if logprobs is not None else ())

    async def generate(self, prompt, output=(), sampling=GREEDY, *, proposal=(), piece=1, speculation=None):
        self.calls.append(("generate", tuple(prompt), tuple(output), sampling, tuple(proposal)))
        limit = len(self.tokens) if sampling.max_tokens is None else sampling.max_tokens
        try:
            rest = self.tokens[len(output) : limit]
            accepted = 0
            while accepted < min(len(rest), len(proposal)) and rest[accepted] == proposal[accepted]:
                accepted += 1
            if accepted:
                yield TokenDelta(tuple(rest[:accepted]), num_accepted=accepted)
            for token in rest[accepted:]:
                await asyncio.sleep(0)
                yield TokenDelta((token,))
            yield TokenDelta((), finish_reason="length" if limit < len(self.tokens) else "stop")
        finally:
            self.closed = True


@dataclass
class Scripted:
    """Drafts what it is told to, one script after the other."""

    scripts: list
    ended: bool = True
    asked: list = field(default_factory=list)
    closed: bool = False

    async def draft(self, question, output, *, piece):
        self.asked.append(tuple(output))
        try:
            script = self.scripts.pop(0)
            for start in range(0, len(script), piece):
                for part in script[start : start + piece]:
                    if isinstance(part, Exception):
                        raise part
                await asyncio.sleep(0)
                yield TokenDelta(tuple(script[start : start + piece]))
            yield TokenDelta((), finish_reason="stop" if self.ended else "length")
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def make(tokenizer):
    check = build_verification_suffix(tokenizer, "Is this right so far?")

    def build(target, drafter, **settings):
        method = VerificationSettings(stride=4, **settings)
        return Pipeline(verifier=target, tokenizer=tokenizer, check=check, settings=method, drafter=drafter)

    return build


def answered(pipeline, mode, sampling=GREEDY, **asked):
    async def collect():
        return [
            event
            async for event in pipeline.answer(GenerationRequest(PROMPT, sampling_params=sampling, mode=mode, **asked))
        ]

    events = asyncio.run(collect())
    pieces = [e for e in events if isinstance(e, TextDelta)]
    ids = [token for piece in pieces for token in piece.token_ids]
    assert isinstance(events[-1], Finished)
    return ids, pieces, [e for e in events if isinstance(e, Verification)], events[-1]


def test_a_right_draft_is_the_answer_and_the_target_writes_nothing(make):
    target, drafter = Target(), Scripted([RIGHT])
    ids, pieces, verdicts, done = answered(make(target, drafter), "full")
    assert ids == RIGHT and {piece.origin for piece in pieces} == {"draft"}
    assert [call[0] for call in target.calls] == ["warm", "judge"]
    assert target.calls[1] == ("judge", PROMPT, tuple(RIGHT), (4, 8, 12, 16, 20), Thresholds().full)
    assert [(v.accepted_prefix_length, v.rejected_text) for v in verdicts] == [(20, "")]
    assert done.finish_reason == "stop"
    assert (
        done.usage.draft_tokens,
        done.usage.accepted_tokens,
        done.usage.target_tokens,
        done.usage.accepted_prefix_length,
    ) == (20, 20, 0, 20)


@pytest.mark.parametrize(("wrong_at", "kept"), [(0, 0), (3, 0), (4, 4), (13, 12), (19, 16)])
def test_of_a_wrong_draft_the_last_prefix_before_the_error_stands(make, tokenizer, wrong_at, kept):
    draft = [*RIGHT[:wrong_at], WRONG, *RIGHT[wrong_at + 1 :]]
    target = Target()
    ids, _, verdicts, done = answered(make(target, Scripted([draft])), "full")
    assert ids == draft[:kept] + OWN[kept:]
    assert verdicts[0].accepted_prefix_length == kept and verdicts[0].rejected_text == tokenizer.decode(draft[kept:])
    assert target.calls[-1][2] == tuple(draft[:kept])
    assert (done.usage.accepted_tokens, done.usage.rejected_tokens, done.usage.target_tokens) == (
        kept,
        20 - kept,
        20 - kept,
    )


def test_the_full_answer_is_asked_about_only_if_the_draft_ended_by_itself(make):
    target = Target()
    ids, _, _, done = answered(make(target, Scripted([RIGHT[:10]], ended=False)), "full")
    assert target.calls[1] == ("judge", PROMPT, tuple(RIGHT[:10]), (4, 8), None)
    assert ids == RIGHT[:8] + OWN[8:] and done.usage.accepted_tokens == 8


def test_thresholds_of_the_request_count(make):
    ids, _, _, _ = answered(make(Target(), Scripted([RIGHT])), "full", thresholds=Thresholds(1.0, 1.0))
    assert ids == OWN


def test_the_target_reads_the_prompt_while_the_drafter_writes(make):
    target = Target()
    order = []

    class Slow(Scripted):
        async def draft(self, question, output, *, piece):
            async for tokens in super().draft(question, output, piece=piece):
                order.append([call[0] for call in target.calls])
                yield tokens

    answered(make(target, Slow([RIGHT])), "full")
    assert order[-1] == ["warm"]


def test_off_leaves_the_drafter_alone(make):
    drafter = Scripted([RIGHT])
    ids, pieces, verdicts, done = answered(make(Target(), drafter), "off")
    assert ids == OWN and not drafter.asked and not verdicts
    assert {piece.origin for piece in pieces} == {"target"} and done.usage.draft_tokens == 0


def test_a_token_limit_cuts_the_draft_before_it_is_judged(make):
    target = Target()
    ids, _, _, done = answered(make(target, Scripted([RIGHT])), "full", replace(GREEDY, max_tokens=9))
    assert target.calls[1] == ("judge", PROMPT, tuple(RIGHT[:9]), (4, 8), None)
    assert ids == [*RIGHT[:8], OWN[8]] and done.finish_reason == "length"


def test_a_limit_that_the_accepted_draft_reaches_ends_the_answer(make):
    target = Target()
    ids, _, _, done = answered(make(target, Scripted([RIGHT])), "full", replace(GREEDY, max_tokens=20))
    assert ids == RIGHT and done.finish_reason == "stop"
    assert "generate" not in [call[0] for call in target.calls]


def test_a_stop_string_cuts_the_draft_before_it_is_judged(make, tokenizer):
    text = "Step 1: 27 minus 3 makes 24."
    draft = tokenizer.encode(text)
    stop = " minus 3 ma"  # begins and ends amid tokens
    before = len(tokenizer.encode("Step 1: 27"))
    target = Target()
    ids, pieces, _, done = answered(make(target, Scripted([draft])), "full", replace(GREEDY, stop=(stop,)))
    assert target.calls[1][2] == tuple(draft[:before])
    assert "".join(piece.text for piece in pieces) == "Step 1: 27" and ids == draft[:before]
    assert done.finish_reason == "stop" and "generate" not in [call[0] for call in target.calls]


def test_text_before_a_stop_string_that_begins_within_a_token_is_not_lost(make, tokenizer):
    draft = tokenizer.encode("Step 1: 27 minus 3")
    _, pieces, _, _ = answered(make(Target(), Scripted([draft])), "full", replace(GREEDY, stop=("nus",)))
    assert "".join(piece.text for piece in pieces) == "Step 1: 27 mi"


def test_log_probabilities_of_accepted_tokens_are_the_targets(make):
    _, pieces, _, _ = answered(make(Target(), Scripted([RIGHT])), "full", replace(GREEDY, logprobs=0))
    assert [lp.logprob for piece in pieces for lp in piece.logprobs] == [-float(token) for token in RIGHT]


def test_progressive_judges_what_is_there_while_the_rest_is_written(make):
    """Accepted text flows before the draft is done."""
    shown = asyncio.Event()

    class Waiting(Scripted):
        async def draft(self, question, output, *, piece):
            yield TokenDelta(tuple(RIGHT[:12]))
            await asyncio.wait_for(shown.wait(), 5)
            yield TokenDelta(tuple(RIGHT[12:]), finish_reason="stop")

    async def collect():
        ids: list[int] = []
        async for event in make(Target(), Waiting([]), window=8).answer(
            GenerationRequest(PROMPT, sampling_params=GREEDY, mode="progressive")
        ):
            if isinstance(event, TextDelta):
                ids += event.token_ids
                shown.set()
        return ids

    assert asyncio.run(collect()) == RIGHT


def test_in_progressive_a_failed_window_ends_the_draft(make):
    draft = [*RIGHT[:9], WRONG, *RIGHT[10:], *RIGHT * 20]
    target, drafter = Target(), Scripted([draft])
    ids, _, verdicts, done = answered(make(target, drafter, window=4), "progressive")
    assert ids == RIGHT[:8] + OWN[8:]
    assert drafter.closed and done.usage.draft_tokens < len(draft) / 2
    assert (
        verdicts[-1].rejected_text
        and sum(v.accepted_prefix_length for v in verdicts) == done.usage.accepted_tokens == 8
    )
    judged = [call for call in target.calls if call[0] == "judge"]
    assert all(call[4] is None for call in judged)  # never asked about a full answer: it was not there


def test_progressive_asks_each_cut_once_and_the_full_answer_last(make):
    target = Target()
    ids, _, _, done = answered(make(target, Scripted([RIGHT]), window=8), "progressive")
    cuts = [cut for call in target.calls if call[0] == "judge" for cut in call[3]]
    assert ids == RIGHT and cuts == [4, 8, 12, 16, 20] and done.finish_reason == "stop"
    assert target.calls[-1][4] == Thresholds().full


def test_rounds_hands_the_pen_back_after_a_correction(make):
    first = [*RIGHT[:5], WRONG, *RIGHT[6:]]
    target, drafter = Target(), Scripted([first, RIGHT[7:]])
    ids, _, verdicts, done = answered(make(target, drafter, correction_tokens=3), "rounds")
    assert drafter.asked == [(), (*RIGHT[:4], *OWN[4:7])]
    assert ids == RIGHT[:4] + OWN[4:7] + RIGHT[7:]
    assert [v.start for v in verdicts] == [0, 7] and done.finish_reason == "stop"
    assert (done.usage.rounds, done.usage.target_tokens, done.usage.accepted_prefix_length) == (2, 3, 4)


def test_rounds_ends_after_the_rounds_it_may_have(make):
    wrong = [WRONG] * 20
    drafter = Scripted([wrong] * 9)
    ids, _, _, done = answered(make(Target(), drafter, correction_tokens=2, max_rounds=3), "rounds")
    assert ids == OWN and done.usage.rounds == 3 == len(drafter.asked)


def test_a_correction_may_end_the_answer(make):
    target = Target(tokens=OWN[:6])
    ids, _, _, done = answered(make(target, Scripted([[*RIGHT[:5], WRONG, *RIGHT]]), correction_tokens=8), "rounds")
    assert ids == RIGHT[:4] + OWN[4:6] and done.finish_reason == "stop" and done.usage.rounds == 1


def test_exact_proposes_the_draft_and_takes_what_the_target_says(make):
    target = Target()
    draft = [*OWN[:6], WRONG]
    ids, pieces, verdicts, done = answered(make(target, Scripted([draft])), "exact")
    assert ids == OWN and not verdicts
    assert target.calls[-1][4] == tuple(draft)
    assert [p.token_ids for p in pieces if p.origin == "draft"] == [tuple(OWN[:6])]
    assert (done.usage.accepted_tokens, done.usage.rejected_tokens, done.usage.target_tokens) == (6, 1, 14)


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
@pytest.mark.parametrize("fault", [ConnectionError("gone"), RequestError("prompt", "too long")])
def test_a_drafter_that_fails_costs_only_speed(make, mode, fault):
    ids, _, _, done = answered(make(Target(), Scripted([[fault]])), mode)
    assert ids == OWN and done.finish_reason == "stop"
    assert str(fault) in done.usage.fallback.message


def test_what_a_failing_drafter_had_written_is_judged_like_any_prefix(make):
    draft = [*RIGHT[:9], ConnectionError("gone")]
    target = Target()
    ids, _, _, _ = answered(make(target, Scripted([draft])), "progressive")
    assert ids == RIGHT[:4] + OWN[4:]  # eight tokens had come, and at their end there is no cut


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_an_empty_draft_is_no_draft(make, mode):
    ids, _, _, done = answered(make(Target(), Scripted([[]])), mode)
    assert ids == OWN and done.usage.draft_tokens == 0


def test_without_a_drafter_the_target_answers_and_says_why(make):
    ids, _, _, done = answered(make(Target(), None), "full")
    assert ids == OWN and done.usage.mode == "off" and done.usage.fallback.cause == "none_there"


def test_the_callers_own_draft_takes_the_drafters_place(make):
    drafter = Scripted([])
    pipeline = make(Target(), drafter)
    ids, _, _, done = answered(pipeline, "full", prediction=RIGHT)
    assert ids == RIGHT and not drafter.asked and done.usage.accepted_tokens == 20
    assert pipeline.control.acceptance is None  # it says nothing about the drafter


def test_a_verifiers_error_reaches_the_caller(make):
    class Broken(Target):
        async def judge(self, *args, **kwargs):
            raise RuntimeError("the verifier is gone")

    with pytest.raises(RuntimeError, match="the verifier is gone"):
        answered(make(Broken(), Scripted([RIGHT])), "full")


@pytest.mark.parametrize("mode", ["off", "full", "progressive"])
def test_a_caller_who_leaves_closes_everything(make, mode):
    target, drafter = Target(), Scripted([[*RIGHT[:4], WRONG, *RIGHT * 50]])

    async def leave():
        events = make(target, drafter, window=4).answer(GenerationRequest(PROMPT, sampling_params=GREEDY, mode=mode))
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
        async def judge(self, *args, **kwargs):
            await asyncio.sleep(0.01)
            return await super().judge(*args, **kwargs)

    drafter = Scripted([[WRONG] * 20] * 50)
    pipeline = make(Patient(), drafter)
    seen = [answered(pipeline, "auto")[3].usage for _ in range(12)]
    assert [usage.mode for usage in seen[:3]] == ["rounds"] * 3
    assert [usage.mode for usage in seen[3:11]] == ["off"] * 8
    assert seen[3].fallback.cause == "does_not_pay" and "0% acceptance" in seen[3].fallback.message
    assert seen[11].mode == "rounds"  # a trial


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
@pytest.mark.parametrize("nonsense", [5000, -1, "a", 1.5, None])
def test_nonsense_of_the_drafter_costs_only_its_draft(make, mode, nonsense):
    ids, _, _, done = answered(make(Target(), Scripted([[nonsense]])), mode)
    assert ids == OWN and done.usage.accepted_tokens == 0 and "no draft" in str(done.usage.fallback)


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_a_drafter_that_hangs_or_is_cancelled_by_others_costs_only_its_draft(make, mode):
    class Hanging:
        async def draft(self, question, output, *, piece):
            await asyncio.sleep(1000)
            yield TokenDelta(())

    class Gone:
        async def draft(self, question, output, *, piece):
            raise asyncio.CancelledError
            yield TokenDelta(())

    for drafter, why in ((Hanging(), "longer than 0.05 s"), (Gone(), "cancelled")):
        ids, _, _, done = answered(make(Target(), drafter, draft_timeout_s=0.05), mode)
        assert ids == OWN and why in str(done.usage.fallback)


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_a_draft_ends_at_the_first_token_that_is_no_text(make, tokenizer, mode):
    ids, _, _, done = answered(make(Target(), Scripted([[*RIGHT, tokenizer.eos_token_id, *RIGHT]], ended=False)), mode)
    assert ids == RIGHT and done.finish_reason == "stop"
    ids, _, _, _ = answered(make(Target(), Scripted([[tokenizer.eos_token_id]])), mode)
    assert ids == OWN


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds"])
def test_a_draft_is_no_longer_than_what_the_verifier_takes(make, mode):
    target = Target()
    pipeline = replace(make(target, Scripted([RIGHT, RIGHT, RIGHT])), longest=len(PROMPT) + 9)
    ids, *_ = answered(pipeline, mode)
    assert ids[:8] == RIGHT[:8]
    assert max(len(call[1]) + len(call[2]) for call in target.calls if call[0] == "judge") == len(PROMPT) + 9


@pytest.mark.parametrize("piece", [1, 4, 1 << 30])
@pytest.mark.parametrize("first", range(2, 18, 3))
def test_a_stop_string_may_begin_in_one_piece_of_a_draft_and_end_in_the_next(make, tokenizer, first, piece):
    words = [tokenizer.encode(f" {number}")[0] for number in range(10, 30)]
    assert len(words) == 20
    stop = tokenizer.decode(words[first : first + 2])[1:]
    pipeline = make(Target(), Scripted([words]))
    settings = pipeline.settings.model_copy(update={"window": 4, "stride": min(piece, 4)})
    pipeline = replace(pipeline, settings=settings)
    _, pieces, _, done = answered(pipeline, "progressive", SamplingParams(temperature=0.0, stop=(stop,)))
    whole = tokenizer.decode(words)
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)] and done.finish_reason == "stop"


@pytest.mark.parametrize(
    "verdict",
    [
        VerifyResult((0.99,)),
        VerifyResult((0.0,) * 5 + (1.0,)),
        VerifyResult(()),
        VerifyResult((7.0,) * 5),
        VerifyResult((float("nan"),) * 5),
        VerifyResult((0.99,) * 5),  # without the log-probabilities
    ],
)
def test_a_verdict_that_does_not_fit_is_an_error_and_accepts_nothing(make, verdict):
    class Slipping(Target):
        async def judge(self, *_, **__):
            return verdict

    with pytest.raises(VerificationError):
        answered(make(Slipping(), Scripted([RIGHT])), "full", SamplingParams(temperature=0.0, logprobs=0))


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_who_leaves_leaves_nothing_running(make, mode):
    class Slow(Target):
        async def warm(self, prompt):
            await asyncio.sleep(1000)

    class Hanging:
        async def draft(self, question, output, *, piece):
            await asyncio.sleep(1000)
            yield TokenDelta(())

    async def leave():
        pipeline = make(Slow(), Hanging())
        answering = asyncio.create_task(anext(pipeline.answer(GenerationRequest(PROMPT, mode=mode))))
        await asyncio.sleep(0.01)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(leave()) == set()


@pytest.mark.parametrize("prediction", [[5000], [-1], ["a"], [1.5]])
def test_a_prediction_that_is_none_is_refused_by_name(make, prediction):
    for mode in ("full", "progressive", "rounds", "exact"):
        with pytest.raises(RequestError, match="prediction: "):
            answered(make(Target(), None), mode, prediction=prediction)


def test_a_mode_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match=r"mode: must be one of auto, full.*got 'ful'"):
        GenerationRequest(PROMPT, mode="ful")  # type: ignore[arg-type]


@dataclass
class Speculating(Target):
    """Says of each piece that it came of a pass with two tokens proposed, of which the first was right."""

    asked: list = field(default_factory=list)

    async def generate(self, *given, speculation=None, **named):
        self.asked.append(speculation)
        async for tokens in super().generate(*given, **named):
            yield replace(tokens, speculated=SpeculationStats(speculation or "parallel", 1, (1, 1), (1, 0)))


@pytest.mark.parametrize("choice", [None, "eagle3"])
def test_the_question_s_choice_is_asked_for_each_time_the_target_writes_and_what_came_of_it_adds_up(make, choice):
    target, drafter = Speculating(), Scripted([[*RIGHT[:5], WRONG, *RIGHT[6:]], [WRONG] * 20])
    ids, _, _, done = answered(make(target, drafter, correction_tokens=3, max_rounds=2), "rounds", speculation=choice)
    assert ids == RIGHT[:4] + OWN[4:]
    assert target.asked == [choice] * 3  # two corrections, and the rest
    passes = 16 + 3  # one for each token, and one for the end of each time
    assert done.usage.speculation == SpeculationStats(choice or "parallel", passes, (passes, passes), (passes, 0))
    assert done.usage.decoded_tokens == done.usage.target_tokens == 16


def test_in_exact_what_stands_of_the_draft_came_of_the_target_s_passes_too(make):
    *_, done = answered(make(Speculating(), Scripted([[*OWN[:6], WRONG]])), "exact")
    assert (done.usage.target_tokens, done.usage.decoded_tokens) == (14, 20)


def test_where_the_target_writes_nothing_or_token_by_token_nothing_was_speculated(make):
    for target, mode in ((Speculating(), "full"), (Target(), "off")):
        *_, done = answered(make(target, Scripted([RIGHT])), mode)
        assert done.usage.speculation is None


def test_a_method_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match=r"speculation: must be one of draft_model, .*none, got 'eagle'"):
        GenerationRequest(PROMPT, speculative_method="eagle")  # type: ignore[arg-type]


def test_stages_tell_when_each_thing_was_done_and_how_much_of_the_prompt_was_known(make):
    @dataclass
    class Remembering(Target):
        async def warm(self, prompt):
            await super().warm(prompt)
            return 2

        async def judge(self, *args, **kwargs):
            return replace(await super().judge(*args, **kwargs), cached=len(PROMPT) + 5)

    draft = [*RIGHT[:10], WRONG, *RIGHT[11:]]
    for warms, cached in ((True, 2), (False, len(PROMPT))):
        pipeline = replace(make(Remembering(), Scripted([draft])), warms=warms)
        *_, done = answered(pipeline, "full")
        usage = done.usage
        stages = {stage.name: stage for stage in usage.stages}
        assert list(stages) == (["warm"] if warms else []) + ["draft", "judge", "write"]
        assert 0 <= stages["draft"].start <= stages["draft"].end <= stages["judge"].start <= stages["judge"].end
        assert stages["judge"].end <= stages["write"].start <= stages["write"].end <= usage.total_s
        assert usage.seconds("judge", "write") == usage.seconds("judge") + usage.seconds("write") > 0
        assert usage.cached_tokens == cached
