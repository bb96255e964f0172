"""The calls of a pair: synchronous and asynchronous, their arguments and errors, and how a pair ends."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import aclosing

import pytest

from parse import (
    DEMO_DRAFT,
    DEMO_TARGET,
    EXAMPLE_PROMPT,
    EngineSettings,
    EngineStopped,
    Finished,
    GenerationOutput,
    Pair,
    RequestError,
    SamplingParams,
    SpeculativeConfig,
    TextDelta,
    Thresholds,
    Verification,
    VerificationSettings,
)

PATIENCE_S = 300
PROMPTS = [EXAMPLE_PROMPT.replace("73", str(number)) for number in (73, 74, 75, 76)]


def settings(path, **changes):
    return EngineSettings(model=path, num_threads=1, max_model_len=1024, kv_cache_memory_bytes=256 * 2**20, **changes)


def open_pair():
    return Pair(settings(DEMO_TARGET), settings(DEMO_DRAFT))


@pytest.fixture(scope="module")
def pair():
    methods = (SpeculativeConfig(method="ngram"),)
    with Pair(settings(DEMO_TARGET, speculative_configs=methods), settings(DEMO_DRAFT)) as pair:
        yield pair


@pytest.fixture(scope="module")
def answers(pair):
    return [pair.generate(prompt, mode="full", temperature=0) for prompt in PROMPTS]


def wait_until_idle(pair):
    deadline = time.monotonic() + PATIENCE_S
    while any(engine.stats.num_running or engine.stats.num_waiting for engine in (pair.target, pair.draft)):
        assert time.monotonic() < deadline, "a request is still running"
        time.sleep(0.01)


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("engine ", "pair "))]


def test_a_pair_answers_in_one_line(answers):
    answer = answers[0]
    assert isinstance(answer, GenerationOutput)
    assert str(answer) == answer.text and "Ben" in answer.text.splitlines()[-1]
    assert answer.usage.mode == "full" and 0 < answer.usage.accepted_tokens < answer.usage.draft_tokens
    assert "".join(segment.text for segment in answer.segments) == answer.text
    assert {segment.origin for segment in answer.segments} == {"draft", "target"}
    accepted = sum(len(segment.token_ids) for segment in answer.segments if segment.origin == "draft")
    assert accepted == answer.usage.accepted_tokens
    rejected = answer.verifications[0].rejected_text
    assert rejected and rejected in answer._repr_html_().replace("&lt;", "<").replace("&gt;", ">")


def test_a_stream_yields_the_same_answer_and_ends_with_the_usage(pair, answers):
    events = list(pair.stream(PROMPTS[0], mode="full", temperature=0))
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == answers[0].text
    assert sum(isinstance(event, Verification) for event in events) == 1
    assert isinstance(events[-1], Finished) and events[-1].usage.draft_tokens == answers[0].usage.draft_tokens
    assert sum(isinstance(event, Finished) for event in events) == 1


def test_asynchronous_calls_give_the_same_answer(pair, answers):
    async def call():
        answer = await pair.agenerate(PROMPTS[0], mode="full", temperature=0)
        async with aclosing(pair.astream(PROMPTS[0], mode="full", temperature=0)) as events:
            return answer, [event async for event in events]

    answer, events = asyncio.run(call())
    assert answer.text == answers[0].text
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == answers[0].text


def test_synchronous_calls_work_where_an_event_loop_runs(pair, answers):
    async def call():
        return pair.generate(PROMPTS[0], mode="full", temperature=0), list(pair.stream(PROMPTS[0], temperature=0))

    answer, events = asyncio.run(call())
    assert answer.text == answers[0].text and isinstance(events[-1], Finished)


def test_calls_from_several_threads_and_loops_share_the_passes(pair):
    expected = [pair.generate(prompt, mode="off", temperature=0).text for prompt in PROMPTS]
    texts = {}
    steps, requests = pair.target.stats.num_steps, pair.target.stats.num_step_requests

    def call(index):
        if index % 2:
            texts[index] = pair.generate(PROMPTS[index], mode="off", temperature=0).text
        else:
            texts[index] = asyncio.run(pair.agenerate(PROMPTS[index], mode="off", temperature=0)).text

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(PROMPTS))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert [texts[index] for index in range(len(PROMPTS))] == expected
    batch_size = (pair.target.stats.num_step_requests - requests) / (pair.target.stats.num_steps - steps)
    assert batch_size > 1.5


def test_asynchronous_calls_can_be_gathered(pair, answers):
    async def call():
        return await asyncio.gather(*(pair.agenerate(prompt, mode="full", temperature=0) for prompt in PROMPTS))

    assert [answer.text for answer in asyncio.run(call())] == [answer.text for answer in answers]


def test_the_prompt_can_be_a_conversation(pair, answers):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert pair.generate(messages, mode="full", temperature=0).text == answers[0].text
    longer = [*messages, {"role": "assistant", "content": "Ben."}, {"role": "user", "content": PROMPTS[1]}]
    answer = pair.generate(longer, mode="off", temperature=0, max_tokens=5)
    assert len(answer.prompt_token_ids) > len(answers[0].prompt_token_ids)


def test_sampling_parameters_are_given_one_by_one_or_together(pair):
    one_by_one = pair.generate(PROMPTS[0], mode="off", temperature=0.7, seed=3, max_tokens=9, logprobs=1)
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=9, logprobs=1)
    together = pair.generate(PROMPTS[0], mode="off", sampling_params=params)
    assert one_by_one.token_ids == together.token_ids and len(one_by_one.token_ids) == 9
    assert one_by_one.finish_reason == "length"
    assert one_by_one.logprobs is not None and len(one_by_one.logprobs) == 9


def test_the_default_is_sampling_with_a_fixed_seed(pair):
    def sample(**options):
        return pair.generate("What do you know?", mode="off", max_tokens=20, **options).token_ids

    plain = sample()
    assert plain == sample() == sample(temperature=1.0, seed=0)
    assert any(sample(seed=seed) != plain for seed in range(1, 5))


def test_a_stop_string_can_be_a_single_text(pair):
    alone = pair.generate(PROMPTS[0], mode="off", temperature=0)
    answer = pair.generate(PROMPTS[0], mode="off", temperature=0, stop="\n")
    assert answer.text == alone.text.split("\n")[0] and answer.finish_reason == "stop"


def test_a_prediction_replaces_the_draft(pair):
    alone = pair.generate(PROMPTS[0], mode="off", temperature=0)
    for prediction in (alone.text, alone.token_ids):
        answer = pair.generate(PROMPTS[0], mode="full", temperature=0, prediction=prediction)
        assert answer.text == alone.text and answer.usage.target_tokens == 0
        assert answer.usage.accepted_tokens == answer.usage.draft_tokens == len(alone.token_ids)


def test_thresholds_apply_to_one_call(pair, answers):
    everything = pair.generate(PROMPTS[0], mode="full", temperature=0, thresholds=Thresholds(full=0.0, prefix=0.0))
    assert everything.usage.accepted_tokens == everything.usage.draft_tokens and everything.text != answers[0].text
    nothing = pair.generate(PROMPTS[0], mode="full", temperature=0, thresholds=Thresholds(full=1.0, prefix=1.0))
    assert nothing.usage.accepted_tokens == 0


def test_a_speculative_method_is_chosen_by_name(pair):
    texts = set()
    for method, expected in ((None, "ngram"), ("ngram", "ngram"), ("none", None)):
        answer = pair.generate(PROMPTS[0], mode="off", temperature=0, speculative_method=method)
        assert (answer.usage.speculation and answer.usage.speculation.method) == expected
        texts.add(answer.text)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: must not be empty"),
        ("  \n", {}, "prompt: must not be empty"),
        ([], {}, "prompt: must not be empty"),
        (7, {}, "prompt: must be a text or a list of messages, got 7"),
        (["Hello."], {}, r"prompt\[0\]: must be a dict with role and content, got 'Hello.'"),
        ([{"role": "user"}], {}, r"prompt\[0\]: must be a dict with role and content"),
        ([{"role": "usr", "content": "Hello."}], {}, r"prompt\[0\]\.role: must be one of system, user, assistant"),
        ([{"role": "user", "content": None}], {}, r"prompt\[0\]\.content: must be text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}],
            {},
            r"prompt\[0\]\.content: must be text, got \[.*join the texts of a list of parts",
        ),
        ([{"role": "user", "content": "a\ud800"}], {}, r"prompt\[0\]\.content: must be valid Unicode"),
        ("a\ud800", {}, r"prompt: must be valid Unicode; the character '\\ud800' at index 1 is a surrogate"),
        (b"Hello.", {}, "prompt: must be a text or a list of messages, got b'Hello.'"),
        ("Hello.", {"mode": ["full"]}, r"mode: must be one of auto, full, .* got \['full'\]"),
        ("Hello.", {"ignore_eos": "no"}, "ignore_eos: must be True or False, got 'no'"),
        ("Hello.", {"prediction": b"Hello."}, "prediction: must be a text or token ids, got b'Hello.'"),
        ("Hello.", {"prediction": "\udc00"}, "prediction: must be valid Unicode"),
        ("Hello. " * 2000, {}, r"prompt: is \d+ tokens long; prompt and answer together are limited to 1024"),
        ("Hello.", {"mode": "fulll"}, "mode: must be one of auto, full, .* got 'fulll'"),
        ("Hello.", {"temprature": 0}, r"temprature: is not an argument; did you mean temperature\?"),
        ("Hello.", {"temperature": 9}, "temperature: must be at least 0.0 and at most 2.0, got 9"),
        ("Hello.", {"max_tokens": -1}, "max_tokens: must be at least 0"),
        ("Hello.", {"sampling_params": {}}, "sampling_params: must be SamplingParams"),
        ("Hello.", {"sampling_params": SamplingParams(), "seed": 1}, "sampling_params: cannot be combined with seed"),
        (
            "Hello.",
            {"thresholds": 0.9},
            r"thresholds: must be Thresholds, for example Thresholds\(full=0.99\), got 0.9",
        ),
        ("Hello.", {"prediction": ""}, "prediction: must not be empty"),
        ("Hello.", {"prediction": [1 << 20]}, "prediction: token ids must lie in"),
        ("Hello.", {"prediction": 4}, "prediction: must be a text or token ids"),
        ("Hello.", {"speculative_method": "medusa"}, "speculative_method: must be one of .* got 'medusa'"),
        ("Hello.", {"speculative_method": "eagle3"}, "speculative_method: must be one of ngram, none, got 'eagle3'"),
    ],
)
def test_invalid_arguments_are_reported_by_name_before_anything_is_computed(pair, prompt, options, message):
    for call in (pair.generate, pair.stream, pair.astream):
        with pytest.raises(RequestError, match=f"^{message}"):
            call(prompt, **options)
    with pytest.raises(RequestError, match=f"^{message}"):
        asyncio.run(pair.agenerate(prompt, **options))


def test_a_mode_that_needs_a_draft_is_rejected_without_a_draft_model():
    with Pair(settings(DEMO_TARGET)) as alone:
        assert alone.draft is None
        with pytest.raises(RequestError, match="mode: full needs a draft model or a `prediction`"):
            alone.generate("Hello.", mode="full")
        assert alone.generate("Hello.", max_tokens=3).usage.mode == "off"
        predicted = alone.generate(EXAMPLE_PROMPT, mode="full", temperature=0, prediction="Step 1: Uma 73 > 27")
        assert predicted.usage.mode == "full" and predicted.usage.draft_tokens > 0


def test_a_call_uses_the_verification_settings_of_the_pair():
    strict = VerificationSettings.for_model(DEMO_TARGET, full=1.0, prefix=1.0)
    with Pair(settings(DEMO_TARGET), settings(DEMO_DRAFT), verification=strict) as other:
        usage = other.generate(EXAMPLE_PROMPT, mode="full", temperature=0).usage
        assert usage.draft_tokens > 0 and usage.accepted_tokens == 0
    with pytest.raises(RequestError, match="verification: must be VerificationSettings, got"):
        Pair(DEMO_TARGET, verification={"full": 1.0})  # type: ignore[arg-type]


def test_closing_a_stream_aborts_the_answer(pair):
    stream = pair.stream(PROMPTS[0], mode="off", ignore_eos=True)
    first = next(stream)
    assert isinstance(first, TextDelta)
    stream.close()
    wait_until_idle(pair)
    for _ in pair.stream(PROMPTS[0], mode="off", ignore_eos=True):
        break
    wait_until_idle(pair)


def test_closing_an_asynchronous_stream_aborts_the_answer(pair):
    async def call():
        async with aclosing(pair.astream(PROMPTS[0], mode="off", ignore_eos=True)) as events:
            await anext(events)

    asyncio.run(call())
    wait_until_idle(pair)


def test_cancelling_an_asynchronous_call_aborts_the_answer(pair):
    async def call():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pair.agenerate(PROMPTS[0], mode="off", ignore_eos=True), 0.2)

    asyncio.run(call())
    wait_until_idle(pair)


def test_a_closed_pair_rejects_calls_and_can_be_closed_again():
    other = open_pair()
    stream = other.stream(EXAMPLE_PROMPT)
    other.close()
    other.close()
    assert repr(other).endswith("closed)")
    for call in (other.generate, other.stream, other.astream):
        with pytest.raises(EngineStopped, match="the pair is closed; create a new Pair"):
            call("Hello.")
    with pytest.raises(EngineStopped, match="the pair is closed"):
        next(stream)


def test_closing_a_pair_ends_the_calls_in_progress():
    other = open_pair()
    stream = other.stream(EXAMPLE_PROMPT, mode="off", ignore_eos=True)
    next(stream)
    errors = []

    def call():
        try:
            other.generate(EXAMPLE_PROMPT, mode="off", ignore_eos=True)
        except EngineStopped as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    while other.target.stats.num_running < 2:
        time.sleep(0.01)
    other.close()
    caller.join(PATIENCE_S)
    assert len(errors) == 1
    with pytest.raises(EngineStopped):
        list(stream)


@pytest.mark.parametrize("mode", ["full", "progressive"])
def test_closing_a_pair_while_it_drafts_is_no_fault_of_the_drafter(mode, caplog):
    other = open_pair()
    errors = []

    def call():
        while True:
            try:
                other.generate(EXAMPLE_PROMPT, mode=mode)
            except EngineStopped as error:
                errors.append(error)
                break

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    while not other.draft.stats.num_running:
        time.sleep(0.001)
    other.close()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert len(errors) == 3 and not caplog.records


def test_a_pair_is_closed_by_both_kinds_of_with_blocks():
    before = engine_threads()

    async def call():
        async with open_pair() as other:
            return await other.agenerate("Hello.", max_tokens=3)

    assert asyncio.run(call()).token_ids
    with open_pair() as other:
        assert other.generate("Hello.", max_tokens=3).token_ids
    assert engine_threads() == before


def test_a_pair_is_closed_when_it_is_garbage():
    before = engine_threads()
    other = open_pair()
    other.generate("Hello.", max_tokens=3)
    reference = weakref.ref(other)
    assert len(engine_threads()) == len(before) + 3
    del other
    gc.collect()
    assert reference() is None and engine_threads() == before


def test_a_stream_keeps_its_pair():
    events = list(open_pair().stream("Hello.", max_tokens=3))
    assert isinstance(events[-1], Finished)


def test_a_failed_constructor_leaves_no_threads(tmp_path):
    before = engine_threads()
    with pytest.raises(ValueError, match="draft"):
        Pair(settings(DEMO_TARGET), tmp_path)
    assert engine_threads() == before


@pytest.mark.parametrize(
    "ending",
    [
        # The pair is idle and part of a reference cycle.
        "cycle = [pair]; cycle.append(cycle)",
        # A stream is open, and another thread waits for an answer.
        "stream = pair.stream(EXAMPLE_PROMPT, mode='off', ignore_eos=True); next(stream)\n"
        "import threading; options = dict(mode='off', ignore_eos=True)\n"
        "threading.Thread(target=pair.generate, args=(EXAMPLE_PROMPT,), kwargs=options, daemon=True).start()",
    ],
)
def test_the_interpreter_ends_with_an_open_pair(ending):
    code = (
        "from parse import *\npair = Pair(DEMO_TARGET, DEMO_DRAFT)\n"
        f"print(pair.generate('Hello.', max_tokens=3).finish_reason)\n{ending}"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0 and ended.stdout.strip() in ("length", "stop"), ended.stderr
    assert "Fatal" not in ended.stderr and "terminate" not in ended.stderr
