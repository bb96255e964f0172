import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from parse.acceptance import AcceptancePolicy, Thresholds
from parse.config import EngineSettings
from parse.demo import DEMO_MODELS
from parse.engines.native.checkpoint import CheckpointError
from parse.engines.native_loader import load_native_engine
from parse.errors import EngineStopped, RequestCancelled, RequestError
from parse.prompts import VerificationSuffix, build_verification_suffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import SamplingParams
from tests.parse.engines.native.tiny import build, plain
from training.task import correct_answer, draw_problem

GREEDY = SamplingParams(temperature=0)
GAP = 1e-4  # between the two best logits; with less, rounding may choose
MAX_MODEL_LEN = 200
SUFFIX = VerificationSuffix((7, 5, 90), correct_token_ids=(11, 12), incorrect_token_ids=(13,))


def text(rng, size):
    return [rng.randrange(10, 500) for _ in range(size)]


@pytest.fixture(scope="session")
def path(tmp_path_factory, tokenizer):
    """A random model whose layers see all, and but a few tokens, by turns."""
    where = tmp_path_factory.mktemp("model")
    network = build("gemma3_text", vocab_size=len(tokenizer), head_dim=16, tie_word_embeddings=False)
    network.generation_config.eos_token_id = list(range(20, 500, 16))  # so many that texts do end
    network.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def reference(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def settings(path, **changes):
    small = dict(
        device="cpu",
        kv_cache_memory_bytes=6 * 2**20,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=6,
        max_num_batched_tokens=40,
    )
    return EngineSettings(model=str(path), **small | changes)


@pytest.fixture(scope="module")
def engine(path):
    engine = load_native_engine(settings(path))
    yield engine
    engine.shutdown()


async def collect(stream):
    async with aclosing(stream) as deltas:
        return [delta async for delta in deltas]


def ids(deltas):
    return [token for delta in deltas for token in delta.token_ids]


async def at_rest(engine):
    """Nothing runs or waits, seen twice: on its way from one to the other a request is nowhere for a moment."""
    quiet = 0
    for _ in range(2000):
        quiet = 0 if engine.stats.num_running or engine.stats.num_waiting else quiet + 1
        if quiet == 2:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("somebody is still running")


def start(engine, prompt, output=(), params=GREEDY, *, draft=(), stream_interval=1):
    return engine.generate(
        GenerateRequest(
            prompt_token_ids=prompt,
            output_token_ids=output,
            sampling_params=params,
            draft_token_ids=draft,
            stream_interval=stream_interval,
        )
    )


async def write(engine, *args, **options):
    return ids(await collect(start(engine, *args, **options)))


def verification(prompt, draft, prefix_lengths, suffix, *, full=None, logprobs=None):
    """Evaluates every prefix, or with `full` none if the complete draft passes."""
    policy = None if full is None else AcceptancePolicy(Thresholds(full=full), "longest_passing")
    return VerifyRequest(
        prompt_token_ids=prompt,
        draft_token_ids=draft,
        draft_complete=full is not None,
        prefix_lengths=prefix_lengths,
        suffix=suffix,
        policy=policy,
        num_logprobs=logprobs,
    )


async def verify(engine, *args, **options):
    return await engine.verify(verification(*args, **options))


@asynccontextmanager
async def company(engine, seed=0):
    """Others who come, go, judge, warm, guess and give up, all the while."""
    rng = random.Random(seed)
    stems = [text(rng, 90) for _ in range(6)]
    done: Counter[str] = Counter()

    async def guest():
        while True:
            stem = rng.choice(stems)[: rng.randint(1, 90)]
            kind = rng.choice(["verify", "prefill", "generate", "guess", "give up", "run away"])
            if kind == "verify":
                await verify(engine, stem, text(rng, 12), sorted(rng.sample(range(1, 13), 4)), SUFFIX, logprobs=0)
            elif kind == "prefill":
                await engine.prefill(stem)
            elif kind in ("generate", "guess"):
                params = SamplingParams(seed=rng.randrange(99), max_tokens=9)
                await write(engine, stem, (), params, draft=text(rng, 6) if kind == "guess" else ())
            elif kind == "give up":
                async for _ in start(engine, stem, (), SamplingParams(seed=1, ignore_eos=True)):
                    break
            else:
                task = asyncio.create_task(write(engine, stem, (), SamplingParams(ignore_eos=True)))
                await asyncio.sleep(0.003)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)  # this guest may be cancelled meanwhile
            done[kind] += 1
            await asyncio.sleep(0)

    guests = [asyncio.create_task(guest()) for _ in range(4)]
    try:
        yield done
    finally:
        for task in guests:
            task.cancel()
        outcomes = await asyncio.gather(*guests, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}


def agree(reference, prompt, got, expected):
    """The same tokens, or up to where two were equally good."""
    for place, (one, other) in enumerate(zip(got, expected, strict=False)):
        if one != other:
            best = plain(reference, [*prompt, *expected[:place]])[-1].topk(2)
            return {one, other} == set(best.indices.tolist()) and float(best.values[0] - best.values[1]) < GAP
    return len(got) == len(expected)


def generated(reference, prompts, size, eos_token_ids):
    """What `generate()` writes, prompts of equal length together."""
    expected = {}
    for length in {len(prompt) for prompt in prompts}:
        alike = [prompt for prompt in prompts if len(prompt) == length]
        out = reference.generate(
            torch.tensor(alike), max_new_tokens=size, do_sample=False, eos_token_id=list(eos_token_ids), pad_token_id=0
        )
        for prompt, row in zip(alike, out[:, length:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in eos_token_ids), size)
            expected[tuple(prompt)] = row[:stop]
    return expected


def test_greedy_texts_are_those_of_generate_whoever_else_is_served(engine, reference):
    rng = random.Random(0)
    stems = [text(rng, 80) for _ in range(20)]
    prompts = [
        [*rng.choice(stems)[: (length := rng.choice([1, 2, 15, 16, 17, 40, 63, 80])) - 1], rng.randrange(10, 500)][
            :length
        ]
        for _ in range(200)
    ]
    expected = generated(reference, prompts, 20, engine.model.eos_token_ids)
    assert len({len(generated_ids) for generated_ids in expected.values()}) > 10

    async def all_of_them():
        slots = asyncio.Semaphore(10)

        async def one(prompt):
            async with slots:
                return await write(engine, prompt, (), replace(GREEDY, max_tokens=20))

        async with company(engine) as done:
            got = await asyncio.gather(*map(one, prompts))
            return got, done

    got, done = asyncio.run(all_of_them())
    assert len(done) == 6, "some kinds of company never came"
    wrong = [p for p, one in zip(prompts, got, strict=True) if not agree(reference, p, one, expected[tuple(p)])]
    assert not wrong


def test_the_demo_target_writes_what_generate_writes(tokenizer):
    target = AutoModelForCausalLM.from_pretrained(DEMO_MODELS / "demo-target")
    prompts = [
        chat_prompt_token_ids(tokenizer, [{"role": "user", "content": draw_problem("test", 3, index).question}])
        for index in range(6)
    ]
    engine = load_native_engine(
        settings(DEMO_MODELS / "demo-target", kv_cache_memory_bytes=128 * 2**20, max_model_len=600)
    )
    try:
        expected = generated(target, prompts, 32, engine.model.eos_token_ids)

        async def all_of_them():
            async with company(engine):
                return await asyncio.gather(
                    *(write(engine, prompt, (), replace(GREEDY, max_tokens=32)) for prompt in prompts)
                )

        for prompt, got in zip(prompts, asyncio.run(all_of_them()), strict=True):
            assert agree(target, prompt, got, expected[tuple(prompt)])
    finally:
        engine.shutdown()


def expected_p_correct(reference, prompt, draft, prefix_lengths):
    """P(correct) at each cut, from a conversation of its own."""
    probabilities = []
    for length in prefix_lengths:
        logits = plain(reference, [*prompt, *draft[:length], *SUFFIX.token_ids])[-1].double().exp()
        yes, no = (
            sum(float(logits[token]) for token in words)
            for words in (SUFFIX.correct_token_ids, SUFFIX.incorrect_token_ids)
        )
        probabilities.append(yes / (yes + no))
    return probabilities


def test_verifications_are_those_of_separate_conversations_whoever_else_is_served(engine, reference):
    rng = random.Random(1)
    cases = []
    for _ in range(25):
        prompt, draft = text(rng, rng.randint(1, 60)), text(rng, rng.randint(1, 60))
        cases.append((prompt, draft, sorted(rng.sample(range(1, len(draft) + 1), min(len(draft), 5)))))

    async def all_of_them():
        async with company(engine):
            logprobs = (2 if index % 2 else None for index in range(len(cases)))
            calls = (verify(engine, *case, SUFFIX, logprobs=n) for case, n in zip(cases, logprobs, strict=True))
            return await asyncio.gather(*calls)

    spread = []
    for index, (case, got) in enumerate(zip(cases, asyncio.run(all_of_them()), strict=True)):
        prompt, draft, prefix_lengths = case
        expected = expected_p_correct(reference, *case)
        spread += expected
        assert got.p_correct == pytest.approx(expected, abs=1e-4)
        if index % 2:
            logprob_rows = plain(reference, [*prompt, *draft]).log_softmax(-1)[len(prompt) - 1 :]
            own = [float(row[token]) for row, token in zip(logprob_rows, draft[: prefix_lengths[-1]], strict=False)]
            assert [logprob.logprob for logprob in got.logprobs] == pytest.approx(own, abs=1e-4)
            assert all(len(logprob.top) == 2 for logprob in got.logprobs)
        else:
            assert got.logprobs == ()
    assert max(spread) - min(spread) > 0.5, "verdicts hardly differ on this model"


def test_a_search_evaluates_few_prefixes_and_finds_a_failure_after_one_that_passes(engine, reference, monkeypatch):
    options = replace(engine._verify_options(), pass_seconds=lambda num_tokens: 1.0 + num_tokens)
    monkeypatch.setattr(engine, "_verify_options", lambda: options)
    rng = random.Random(8)
    num_evaluated, lengths = 0, range(1, 61)
    for _ in range(10):
        prompt, draft = text(rng, 20), text(rng, 60)
        expected = expected_p_correct(reference, prompt, draft, lengths)
        threshold = sorted(expected)[rng.randrange(60)] - 1e-3
        request = VerifyRequest(
            prompt_token_ids=prompt,
            draft_token_ids=draft,
            prefix_lengths=lengths,
            suffix=SUFFIX,
            policy=AcceptancePolicy(Thresholds(full=1.0, prefix=max(0.0, threshold)), exhaustive=False),
        )
        result = asyncio.run(engine.verify(request))
        evaluated = result.evaluated
        num_evaluated += len(evaluated)
        assert [result.p_correct[i] for i in evaluated] == pytest.approx([expected[i] for i in evaluated], abs=1e-4)
        fused = VerifyAndGenerateRequest(verify=request, sampling_params=GREEDY)
        accepted = fused.accepted_prefix_length(result)
        assert accepted == 60 or (accepted in evaluated and expected[accepted] < threshold)  # the next prefix fails
        assert accepted == 0 or (accepted - 1 in evaluated and expected[accepted - 1] >= threshold)
    assert num_evaluated < 10 * 30


def test_seeds_reproduce_texts_whoever_else_is_served(engine):
    rng = random.Random(2)
    cases = [
        (
            text(rng, rng.randint(1, 60)),
            SamplingParams(
                temperature=rng.choice([0.7, 1.0, 1.5]),
                top_p=rng.choice([0.8, 1.0]),
                top_k=rng.choice([0, 20]),
                presence_penalty=rng.choice([0.0, 0.5]),
                repetition_penalty=rng.choice([1.0, 1.1]),
                seed=seed,
                max_tokens=16,
            ),
        )
        for seed in range(12)
    ]

    async def go_on(prompt, params, full_output):
        """The rest from every third place, with proposals right, wrong and partly right."""
        for split in range(0, len(full_output), 3):
            guess = full_output[split : split + rng.randint(0, 9)] + text(rng, rng.randint(0, 5))
            assert (
                full_output[:split] + await write(engine, prompt, full_output[:split], params, draft=guess)
                == full_output
            )

    async def all_of_them():
        alone = [await write(engine, prompt, (), params) for prompt, params in cases]
        async with company(engine):
            together = await asyncio.gather(*(write(engine, prompt, (), params) for prompt, params in cases))
            assert together == alone
            await asyncio.gather(*(go_on(*case, full_output) for case, full_output in zip(cases, alone, strict=True)))
        other = [await write(engine, prompt, (), replace(params, seed=99)) for prompt, params in cases]
        assert sum(one != two for one, two in zip(alone, other, strict=True)) > 8

    asyncio.run(all_of_them())


def test_log_probabilities_are_those_of_the_text_run_at_once(engine, reference):
    prompt = text(random.Random(3), 30)
    deltas = asyncio.run(
        collect(start(engine, prompt, (), SamplingParams(seed=5, temperature=0.5, max_tokens=12, logprobs=3)))
    )
    generated_ids = ids(deltas)
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
    logprob_rows = plain(reference, [*prompt, *generated_ids]).log_softmax(-1)[len(prompt) - 1 :]
    for row, token, got in zip(logprob_rows, generated_ids, logprobs, strict=False):
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in got.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert len(logprobs) == len(generated_ids)


def test_a_stop_string_ends_the_text_in_whatever_tokens_it_comes(engine, tokenizer):
    prompt = text(random.Random(4), 20)

    async def all_of_them():
        params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
        full_output = await write(engine, prompt, (), params)
        follow_up = tokenizer.decode(full_output, skip_special_tokens=True)
        across = 0
        for stop in {follow_up[start : start + 4] for start in range(len(follow_up) - 4)}:
            needed = next(n for n in count() if stop in tokenizer.decode(full_output[:n], skip_special_tokens=True))
            if needed <= 2 or "\ufffd" in stop:
                continue
            deltas = await collect(start(engine, prompt, full_output[:2], replace(params, stop=("never", stop))))
            assert full_output[:2] + ids(deltas) == full_output[:needed]
            assert deltas[-1].finish_reason == "stop"
            across += stop not in [tokenizer.decode([token]) for token in full_output]
        assert across > 10

    asyncio.run(all_of_them())


def test_limits_count_the_whole_output(engine):
    prompt = text(random.Random(5), 20)

    async def all_of_them():
        full_output = await write(engine, prompt, (), SamplingParams(max_tokens=20, ignore_eos=True))
        assert len(full_output) == 20
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        assert len(await write(engine, prompt, full_output[:13], params)) == 7
        deltas = await collect(start(engine, prompt, full_output[:13], params, draft=full_output[13:] + full_output))
        assert (ids(deltas), deltas[-1].finish_reason) == (full_output[13:], "length")
        full = await write(engine, prompt, (), SamplingParams(ignore_eos=True))
        assert len(prompt) + len(full) == MAX_MODEL_LEN

    asyncio.run(all_of_them())


def test_the_end_token_ends_the_text_and_is_no_part_of_it(engine):
    """The bias makes it certain."""
    prompt, end = text(random.Random(6), 20), max(engine.model.eos_token_ids)

    async def all_of_them():
        biased = SamplingParams(logit_bias={end: 100.0}, max_tokens=5)
        (delta,) = await collect(start(engine, prompt, (), biased))
        assert (delta.token_ids, delta.finish_reason) == ((), "stop")
        assert await write(engine, prompt, (), replace(biased, ignore_eos=True)) == [end] * 5

    asyncio.run(all_of_them())


@pytest.fixture
def slow(path, monkeypatch):
    """A engine of which a step takes a while."""
    engine = load_native_engine(settings(path, max_num_batched_tokens=4, max_num_seqs=2))
    forward = engine.model.forward

    def slowly(*step):
        time.sleep(0.01)
        return forward(*step)

    monkeypatch.setattr(engine.model, "forward", slowly)
    yield engine
    engine.shutdown()


def test_to_leave_early_cancels(slow):
    rng = random.Random(7)
    prompt = text(rng, 3)

    async def leave():
        async for delta in start(slow, prompt, (), SamplingParams(ignore_eos=True)):
            assert delta.finish_reason is None
            break

    async def close():
        stream = start(slow, prompt, (), SamplingParams(ignore_eos=True))
        await anext(stream)
        await stream.aclose()

    async def run_away(work):
        task = asyncio.create_task(work)
        await asyncio.sleep(0)  # it runs up to where it waits for the engine
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def all_of_them():
        for leaving in (
            leave(),
            close(),
            run_away(write(slow, prompt, (), SamplingParams(ignore_eos=True))),
            run_away(verify(slow, prompt, text(rng, 190), [190], SUFFIX)),
            run_away(slow.prefill(text(rng, 200))),
        ):
            before = slow.stats.num_steps
            await leaving
            await at_rest(slow)
            assert slow.stats.num_steps - before < 30, "that is what it would have taken to the end"

    asyncio.run(all_of_them())


def test_who_is_cancelled_by_somebody_else_is_told(slow):
    async def cancelled():
        stream = start(slow, [20], (), SamplingParams(ignore_eos=True))
        await anext(stream)
        (request,) = slow.core.scheduler.running
        slow.core.abort(request)
        with pytest.raises(RequestCancelled):
            async for _ in stream:
                pass

    asyncio.run(cancelled())


def test_slow_readers_get_all_that_was_generated_since_in_one_delta(engine):
    prompt = text(random.Random(10), 20)

    async def all_of_them():
        params = SamplingParams(seed=3, max_tokens=40, ignore_eos=True, logprobs=0)
        full_output = await write(engine, prompt, (), params)
        stream = start(engine, prompt, (), params)
        first = await anext(stream)
        await at_rest(engine)
        (rest,) = [delta async for delta in stream]
        assert ids([first, rest]) == full_output
        assert (len(first.logprobs), len(rest.logprobs)) == (len(first.token_ids), len(rest.token_ids))
        assert (first.finish_reason, rest.finish_reason) == (None, "length")
        steps = engine.stats.num_steps
        task = asyncio.create_task(collect(start(engine, prompt, (), params, draft=full_output[:25])))
        await asyncio.sleep(0)
        while engine.stats.num_steps < steps + 15 or engine.stats.num_running:
            time.sleep(0.01)  # nobody reads
        (delta,) = await task
        assert (list(delta.token_ids), delta.num_accepted, len(delta.logprobs)) == (full_output, 25, 40)

    asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("prompt", lambda s: s.prefill([])),
        ("prompt", lambda s: s.prefill([-1])),
        ("prompt", lambda s: s.prefill([1, 510])),
        ("prompt", lambda s: s.prefill([1] * (MAX_MODEL_LEN + 1))),
        ("prompt", lambda s: s.prefill([1.5])),
        ("prompt", lambda s: s.prefill(["a"])),
        ("prompt", lambda s: s.prefill(list(np.array([range(20)]).T))),
        ("prompt", lambda s: write(s, [])),
        ("prompt", lambda s: write(s, [1, 510])),
        ("prompt", lambda s: write(s, [1] * MAX_MODEL_LEN)),
        ("prompt", lambda s: write(s, [1] * 150, [1] * 50)),
        ("output", lambda s: write(s, [1], [-1])),
        ("output", lambda s: write(s, [1], [1] * 5, SamplingParams(max_tokens=5))),
        ("output", lambda s: write(s, [10], s.model.tokenizer.encode("a STOP"), SamplingParams(stop=("STOP",)))),
        ("draft", lambda s: write(s, [1], draft=[510])),
        ("logit_bias", lambda s: write(s, [1], (), SamplingParams(logit_bias={510: 1.0}))),
        ("prompt", lambda s: verify(s, [], [1], [1], SUFFIX)),
        ("prompt", lambda s: verify(s, [510], [1], [1], SUFFIX)),
        ("draft", lambda s: verify(s, [1], [510], [1], SUFFIX)),
        ("draft", lambda s: verify(s, [1] * 100, [1] * 101, [1], SUFFIX)),
        ("prefix_lengths", lambda s: verify(s, [1], [1, 1], [0], SUFFIX)),
        ("prefix_lengths", lambda s: verify(s, [1], [1, 1], [3], SUFFIX)),
        ("prefix_lengths", lambda s: verify(s, [1], [1, 1], [2, 1], SUFFIX)),
        ("prefix_lengths", lambda s: verify(s, [1], [1, 1], [1, 1], SUFFIX)),
        ("suffix", lambda s: verify(s, [1], [1, 1], [1], replace(SUFFIX, token_ids=(1, 510)))),
        ("suffix", lambda s: verify(s, [1], [1, 1], [1], replace(SUFFIX, token_ids=()))),
        ("suffix", lambda s: verify(s, [1], [1, 1], [1], replace(SUFFIX, correct_token_ids=(-1,)))),
        ("suffix", lambda s: verify(s, [1], [1, 1], [1], replace(SUFFIX, incorrect_token_ids=()))),
    ],
)
def test_bad_input_is_refused_by_the_name_of_its_field_and_harms_nobody(engine, field, call):
    async def refused():
        other = asyncio.create_task(write(engine, [20, 30], (), replace(GREEDY, max_tokens=6, ignore_eos=True)))
        with pytest.raises(RequestError, match=f"^{field}: ") as caught:
            await call(engine)
        assert caught.value.field == field
        assert len(await other) == 6

    asyncio.run(refused())


def test_what_is_just_within_the_limits_is_served(engine, reference):
    rng = random.Random(11)

    async def all_of_them():
        await engine.prefill(text(rng, MAX_MODEL_LEN))
        assert len(await write(engine, text(rng, MAX_MODEL_LEN - 1))) <= 1
        prompt, draft = text(rng, 100), text(rng, 100)
        prefix_lengths = list(range(1, 101))
        result = await verify(engine, prompt, draft, prefix_lengths, SUFFIX)
        assert result.p_correct == pytest.approx(expected_p_correct(reference, prompt, draft, prefix_lengths), abs=1e-4)
        assert (await verify(engine, prompt, draft, [], SUFFIX)).p_correct == ()

    asyncio.run(all_of_them())


def test_no_question_reaches_beyond_the_positions_a_model_knows(tokenizer, tmp_path):
    build("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rng = random.Random(13)
    engine = load_native_engine(settings(tmp_path, max_model_len=4096))
    try:
        assert engine.max_model_len == 256
        prompt, draft = text(rng, 100), text(rng, 156)
        expected = expected_p_correct(reference, prompt, draft, [3, 153])
        for options in ({}, dict(full=0.0), dict(logprobs=0)):
            result = asyncio.run(verify(engine, prompt, draft, [3, 153, 154, 156], SUFFIX, **options))
            assert result.p_correct == (*(pytest.approx(chance, abs=1e-4) for chance in expected), None, None)
            assert len(result.logprobs) == (156 if options == dict(logprobs=0) else 0)
        assert asyncio.run(verify(engine, prompt, draft, [155], SUFFIX, full=0.5)).p_correct == (None,)
        assert len(asyncio.run(write(engine, text(rng, 250), (), replace(GREEDY, ignore_eos=True)))) == 6
    finally:
        engine.shutdown()


def test_each_call_begins_where_the_one_before_left_off(path):
    """warm, judge, generate, and the next turn: each recomputes less than a block of 16."""
    rng = random.Random(12)
    prompt, draft = text(rng, 60), text(rng, 40)
    engine = load_native_engine(settings(path))

    async def computed(work):
        before = engine.stats.num_tokens
        result = await work
        await at_rest(engine)
        return result, engine.stats.num_tokens - before

    async def all_of_them():
        assert (await computed(engine.prefill(prompt)))[1] == 60
        assert (await computed(engine.prefill(prompt)))[1] <= 16
        suffix_tokens = 3 * len(SUFFIX.token_ids)
        assert (await computed(verify(engine, prompt, draft, [10, 20, 40], SUFFIX)))[1] <= 40 + suffix_tokens + 16
        assert (await computed(verify(engine, prompt, draft, [20, 30, 40], SUFFIX)))[1] <= suffix_tokens + 16
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        generated_ids, tokens = await computed(write(engine, prompt, draft[:20], params))
        assert len(generated_ids) == 10
        assert tokens <= 10 + 16
        # What was said is there for the next turn, even where it was proposed and taken all at once.
        full_output = [*prompt, *draft[:20], *generated_ids, *text(rng, 10)]
        assert (await computed(engine.prefill(full_output)))[1] <= 10 + 16
        follow_up = await write(engine, full_output, (), params)
        other = load_native_engine(settings(path))
        try:
            await write(other, full_output, (), params, draft=follow_up)
            before = other.stats.prefix_hits
            await other.prefill([*full_output, *follow_up, 9])
            assert other.stats.prefix_hits - before >= len(full_output) + len(follow_up) - 16
        finally:
            other.shutdown()

    try:
        asyncio.run(all_of_them())
    finally:
        engine.shutdown()


def test_to_close_ends_all_streams(slow):
    async def all_of_them():
        streams = [start(slow, [20 + n] * 9, (), SamplingParams(ignore_eos=True)) for n in range(5)]
        tasks = [asyncio.create_task(collect(stream)) for stream in streams]
        await asyncio.sleep(0)
        slow.shutdown()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {EngineStopped}
        for call in (slow.prefill([1]), write(slow, [1]), verify(slow, [1], [1], [1], SUFFIX)):
            with pytest.raises(EngineStopped):
                await call

    asyncio.run(all_of_them())


def test_a_service_that_cannot_be_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        RequestError, match=r"kv_cache_memory_bytes: a sequence of 600 tokens needs 2\d{7} bytes, got 8388608"
    ):
        load_native_engine(settings(DEMO_MODELS / "demo-target", kv_cache_memory_bytes=8 * 2**20, max_model_len=600))
    with pytest.raises(CheckpointError, match="nowhere"):
        load_native_engine(settings(tmp_path / "nowhere"))


def test_the_question_of_the_chat_template_is_one_that_can_be_asked(engine, tokenizer):
    prompt = chat_prompt_token_ids(tokenizer, [{"role": "user", "content": draw_problem("test", 1, 0).question}])
    draft = tokenizer.encode(correct_answer(draw_problem("test", 1, 0)))[:20]
    check = build_verification_suffix(tokenizer, "Is it right?")
    result = asyncio.run(verify(engine, prompt, draft, [10, 20], check))
    assert all(chance is not None and 0 <= chance <= 1 for chance in result.p_correct)


def test_every_call_tells_how_much_it_found_known(path):
    engine = load_native_engine(settings(path))
    prompt, draft = text(random.Random(1), 40), text(random.Random(2), 20)
    params = replace(GREEDY, max_tokens=len(draft) + 2, ignore_eos=True)

    async def calls():
        cold = await engine.prefill(prompt)
        again = await engine.prefill(prompt)
        num_cached_by_verify = await verify(engine, prompt, draft, [len(draft)], SUFFIX)
        generated_ids = await collect(start(engine, prompt, draft, params))
        return cold, again, num_cached_by_verify.num_cached_tokens, generated_ids

    cold, again, num_cached_by_verify, generated_ids = asyncio.run(calls())
    engine.shutdown()
    assert (cold, again, num_cached_by_verify) == (0, len(prompt), len(prompt))
    assert generated_ids[0].num_cached_tokens == len(prompt) + len(draft) - 1  # its last token is asked for anew
    assert all(delta.num_cached_tokens == 0 for delta in generated_ids[1:])


def test_the_answer_mass_is_the_probability_of_all_answer_tokens(engine, reference):
    rng = random.Random(31)
    prompt, draft, lengths = text(rng, 20), text(rng, 16), (4, 9, 16)
    answers = [*SUFFIX.correct_token_ids, *SUFFIX.incorrect_token_ids]
    expected = [
        float(plain(reference, [*prompt, *draft[:length], *SUFFIX.token_ids])[-1].softmax(-1)[answers].sum())
        for length in lengths
    ]

    def verify(policy):
        request = VerifyRequest(
            prompt_token_ids=prompt, draft_token_ids=draft, prefix_lengths=lengths, suffix=SUFFIX, policy=policy
        )
        return asyncio.run(engine.verify(request))

    assert verify(None).answer_mass == pytest.approx(expected, rel=1e-3)
    smallest, largest = min(expected), max(expected)
    middle = (smallest + largest) / 2  # prefixes with less count as incorrect
    result = verify(AcceptancePolicy(Thresholds(0.0, 0.0), "longest_passing", min_answer_mass=middle))
    assert result.answer_mass == pytest.approx(expected, rel=1e-3)
    assert [p is None for p in result.p_correct] == [mass < middle for mass in expected]


def test_without_prefixes_only_log_probabilities_are_returned(engine, reference):
    rng = random.Random(32)
    prompt, output, draft = text(rng, 20), text(rng, 3), text(rng, 16)
    request = VerifyRequest(
        prompt_token_ids=prompt,
        output_token_ids=output,
        draft_token_ids=draft,
        prefix_lengths=(),
        suffix=SUFFIX,
        policy=None,
        num_logprobs=0,
    )
    before = engine.stats.num_tokens
    result = asyncio.run(engine.verify(request))
    logprobs = plain(reference, [*prompt, *output, *draft]).log_softmax(-1)[len(prompt) + len(output) - 1 : -1]
    expected = logprobs[range(len(draft)), draft].tolist()
    assert [logprob.logprob for logprob in result.logprobs] == pytest.approx(expected, abs=1e-3)
    assert result.p_correct == () and engine.stats.num_tokens - before <= len(prompt) + len(output) + len(draft)


@pytest.mark.parametrize("answer_first", [True, False])
def test_the_fused_call_is_a_verification_and_then_a_generation(engine, tokenizer, monkeypatch, answer_first):
    """The reference are the two calls one after the other, greedy and sampled, with logprobs and stop strings.

    Other requests run at the same time.
    """
    rng = random.Random(21)
    options = replace(
        engine._verify_options(),
        answer_first=answer_first,
        max_nodes=4 * len(SUFFIX.token_ids),
        pass_seconds=lambda num_tokens: 1.0 + num_tokens,
    )
    monkeypatch.setattr(engine, "_verify_options", lambda: options)

    def request(index):
        prompt, output, draft = text(rng, rng.randint(1, 50)), text(rng, rng.choice([0, 0, 5])), text(rng, 24)
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            presence_penalty=rng.choice([0.0, 0.5]),
            seed=index,
            max_tokens=len(output) + rng.choice([3, 24, 30, 40]),
            logprobs=rng.choice([None, 0, 2]),
            stop=tuple(tokenizer.decode(text(rng, 1)) for _ in range(2)),
        )
        lengths = sorted(rng.sample(range(1, 25), 6))
        complete = rng.random() < 0.5
        p_thresholds = Thresholds(full=rng.choice([0.1, 0.5, 0.9]), prefix=rng.choice([0.05, 0.3, 0.6, 0.9]))
        verify_request = VerifyRequest(
            prompt_token_ids=prompt,
            output_token_ids=output,
            draft_token_ids=draft[: lengths[-1]] if complete else draft,
            draft_complete=complete,
            prefix_lengths=lengths,
            suffix=SUFFIX,
            policy=AcceptancePolicy(
                p_thresholds, rng.choice(["first_failure", "longest_passing"]), exhaustive=rng.random() < 0.5
            ),
            num_logprobs=params.logprobs,
        )
        return VerifyAndGenerateRequest(
            verify=verify_request,
            sampling_params=params,
            generate_after_acceptance=rng.random() < 0.8,
            max_continuation_tokens=rng.choice([None, 5]),
        )

    async def apart(request):
        result = await engine.verify(request.verify)
        rest = request.continuation(request.accepted_prefix_length(result))
        return result, await collect(engine.generate(rest)) if rest else []

    async def all_of_them():
        async with company(engine):
            for fused_request in [request(index) for index in range(60)]:
                try:
                    expected, deltas = await apart(fused_request)
                except RequestError as error:  # the accepted prefix holds a stop string
                    with pytest.raises(RequestError, match=str(error.field)):
                        await collect(engine.verify_and_generate(fused_request))
                    continue
                result, *rest = await collect(engine.verify_and_generate(fused_request))
                assert result.p_correct == pytest.approx(expected.p_correct, abs=1e-4)
                assert ids(rest) == ids(deltas)
                assert [delta.finish_reason for delta in rest][-1:] == [delta.finish_reason for delta in deltas][-1:]
                got = [logprob.logprob for delta in rest for logprob in delta.logprobs]
                assert got == pytest.approx([p.logprob for delta in deltas for p in delta.logprobs], abs=1e-4)
                outcomes[(bool(rest), request_kind(fused_request, result))] += 1

    def request_kind(fused_request, result):
        accepted = fused_request.accepted_prefix_length(result)
        return "all" if accepted == len(fused_request.verify.draft_token_ids) else "part" if accepted else "nothing"

    outcomes: Counter = Counter()
    asyncio.run(all_of_them())
    assert {kind for _, kind in outcomes} == {"all", "part", "nothing"} and {rest for rest, _ in outcomes} == {
        True,
        False,
    }


def test_a_fused_call_saves_the_pass_of_the_first_token_and_computes_each_token_once(path):
    """The reference is a verification and a generation in an engine of their own."""
    prompt, draft = text(random.Random(31), 30), text(random.Random(32), 20)
    params = replace(GREEDY, max_tokens=8 + 6, ignore_eos=True)
    policy = AcceptancePolicy(Thresholds(1.0, 0.0), "longest_passing")
    verify_request = replace(verification(prompt, draft, [8], SUFFIX), policy=policy)
    request = VerifyAndGenerateRequest(verify=verify_request, sampling_params=params)
    fused, separate = (load_native_engine(settings(path, max_num_batched_tokens=512)) for _ in range(2))
    try:
        result, *deltas = asyncio.run(collect(fused.verify_and_generate(request)))
        assert asyncio.run(separate.verify(request.verify)).p_correct == pytest.approx(result.p_correct, abs=1e-5)
        assert ids(deltas) == asyncio.run(write(separate, prompt, draft[:8], params))
        assert fused.stats.num_steps == 1 + 5  # the pass of the verification gives the first of six tokens
        assert separate.stats.num_steps == 1 + 6
        assert fused.stats.num_tokens == separate.stats.num_tokens - 1
    finally:
        fused.shutdown()
        separate.shutdown()


def test_the_result_of_a_fused_call_comes_before_anything_is_generated(slow):
    prompt, draft = text(random.Random(22), 10), text(random.Random(23), 8)
    request = VerifyAndGenerateRequest(
        verify=replace(verification(prompt, draft, [4, 8], SUFFIX), policy=AcceptancePolicy(Thresholds(1.0, 1.0))),
        sampling_params=SamplingParams(ignore_eos=True),
    )

    async def leave_after_the_result():
        async with aclosing(slow.verify_and_generate(request)) as results:
            result = await anext(results)
            assert result.p_correct[0] is not None and slow.stats.num_running == 1
        await at_rest(slow)

    asyncio.run(leave_after_the_result())


@pytest.mark.parametrize("logprobs", [None, 0])
def test_what_an_earlier_call_accepted_is_kept_even_where_no_prefix_can_be_evaluated(tokenizer, tmp_path, logprobs):
    """The verification suffix would reach beyond the positions of the model."""
    build("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rng = random.Random(29)
    prompt, draft = text(rng, 200), text(rng, 55)
    params = replace(GREEDY, ignore_eos=True, logprobs=logprobs)
    engine = load_native_engine(settings(tmp_path, max_model_len=4096))
    try:
        request = VerifyAndGenerateRequest(
            verify=replace(verification(prompt, draft, [54, 55], SUFFIX, logprobs=logprobs), policy=AcceptancePolicy()),
            sampling_params=params,
            num_accepted=40,
        )
        result, *deltas = asyncio.run(collect(engine.verify_and_generate(request)))
        assert result.p_correct == (None, None)
        assert ids(deltas) == asyncio.run(write(engine, prompt, draft[:40], params))
    finally:
        engine.shutdown()


def test_a_fused_call_does_not_generate_beyond_the_context_length(engine):
    """The accepted prefix fills the context, so the separate generation would be rejected as well."""
    prompt, draft = text(random.Random(33), MAX_MODEL_LEN - 8), text(random.Random(34), 8)
    policy = AcceptancePolicy(Thresholds(0.0, 0.0))
    verify_request = replace(verification(prompt, draft, [8], SUFFIX), policy=policy)
    params = replace(GREEDY, ignore_eos=True)
    fused_request = VerifyAndGenerateRequest(verify=verify_request, sampling_params=params)

    async def both():
        with pytest.raises(RequestError) as expected:
            await write(engine, prompt, draft, params)
        with pytest.raises(RequestError, match=f"^{expected.value}$"):
            await collect(engine.verify_and_generate(fused_request))

    asyncio.run(both())
