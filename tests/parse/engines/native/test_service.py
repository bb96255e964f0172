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

from parse.config import EngineSettings
from parse.engines.loader import load_native_engine
from parse.engines.native.model import ModelNotFoundError
from parse.prompts import VerificationSuffix, build_verification_suffix, chat_prompt_token_ids
from parse.types import EngineStopped, RequestCancelled, RequestError, SamplingParams
from tests.parse.engines.native.tiny import build, plain
from training.evaluate import MODELS
from training.task import correct_answer, draw_problem

GREEDY = SamplingParams(temperature=0)
GAP = 1e-4  # between the two best logits; with less, rounding may choose
CONTEXT = 200
CHECK = VerificationSuffix((7, 5, 90), correct_token_ids=(11, 12), incorrect_token_ids=(13,))


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
    small = dict(device="cpu", memory_mb=6, max_context=CONTEXT, max_running=6, step_tokens=40)
    return EngineSettings(model=str(path), **small | changes)


@pytest.fixture(scope="module")
def service(path):
    service = load_native_engine(settings(path))
    yield service
    service.shutdown()


async def collect(stream):
    async with aclosing(stream) as pieces:
        return [piece async for piece in pieces]


def ids(pieces):
    return [token for piece in pieces for token in piece.ids]


async def at_rest(service):
    """Nothing runs or waits, seen twice: on its way from one to the other a request is nowhere for a moment."""
    quiet = 0
    for _ in range(2000):
        quiet = 0 if service.load.running or service.load.waiting else quiet + 1
        if quiet == 2:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("somebody is still running")


async def write(service, prompt, output=(), sampling=GREEDY, **options):
    return ids(await collect(service.generate(prompt, output, sampling, **options)))


@asynccontextmanager
async def company(service, seed=0):
    """Others who come, go, judge, warm, guess and give up, all the while."""
    rng = random.Random(seed)
    stems = [text(rng, 90) for _ in range(6)]
    done: Counter[str] = Counter()

    async def guest():
        while True:
            stem = rng.choice(stems)[: rng.randint(1, 90)]
            kind = rng.choice(["judge", "warm", "write", "guess", "give up", "run away"])
            if kind == "judge":
                await service.judge(stem, text(rng, 12), sorted(rng.sample(range(1, 13), 4)), CHECK, logprobs=0)
            elif kind == "warm":
                await service.warm(stem)
            elif kind in ("write", "guess"):
                sampling = SamplingParams(seed=rng.randrange(99), max_tokens=9)
                await write(service, stem, (), sampling, proposal=text(rng, 6) if kind == "guess" else ())
            elif kind == "give up":
                async for _ in service.generate(stem, (), SamplingParams(seed=1, ignore_eos=True)):
                    break
            else:
                task = asyncio.create_task(write(service, stem, (), SamplingParams(ignore_eos=True)))
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


def agree(reference, prompt, got, wanted):
    """The same tokens, or up to where two were equally good."""
    for place, (one, other) in enumerate(zip(got, wanted, strict=False)):
        if one != other:
            best = plain(reference, [*prompt, *wanted[:place]])[-1].topk(2)
            return {one, other} == set(best.indices.tolist()) and float(best.values[0] - best.values[1]) < GAP
    return len(got) == len(wanted)


def generated(reference, prompts, size, ends):
    """What `generate()` writes, prompts of equal length together."""
    wanted = {}
    for length in {len(prompt) for prompt in prompts}:
        alike = [prompt for prompt in prompts if len(prompt) == length]
        out = reference.generate(
            torch.tensor(alike), max_new_tokens=size, do_sample=False, eos_token_id=list(ends), pad_token_id=0
        )
        for prompt, row in zip(alike, out[:, length:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), size)
            wanted[tuple(prompt)] = row[:stop]
    return wanted


def test_greedy_texts_are_those_of_generate_whoever_else_is_served(service, reference):
    rng = random.Random(0)
    stems = [text(rng, 80) for _ in range(20)]
    prompts = [
        [*rng.choice(stems)[: (length := rng.choice([1, 2, 15, 16, 17, 40, 63, 80])) - 1], rng.randrange(10, 500)][
            :length
        ]
        for _ in range(200)
    ]
    wanted = generated(reference, prompts, 20, service.model.ends)
    assert len({len(written) for written in wanted.values()}) > 10

    async def all_of_them():
        slots = asyncio.Semaphore(10)

        async def one(prompt):
            async with slots:
                return await write(service, prompt, (), replace(GREEDY, max_tokens=20))

        async with company(service) as done:
            got = await asyncio.gather(*map(one, prompts))
            return got, done

    got, done = asyncio.run(all_of_them())
    assert len(done) == 6, "some kinds of company never came"
    wrong = [p for p, one in zip(prompts, got, strict=True) if not agree(reference, p, one, wanted[tuple(p)])]
    assert not wrong


def test_the_demo_target_writes_what_generate_writes(tokenizer):
    target = AutoModelForCausalLM.from_pretrained(MODELS / "demo-target")
    prompts = [
        chat_prompt_token_ids(tokenizer, [{"role": "user", "content": draw_problem("test", 3, index).question}])
        for index in range(6)
    ]
    service = load_native_engine(settings(MODELS / "demo-target", memory_mb=128, max_context=600))
    try:
        wanted = generated(target, prompts, 32, service.model.eos_token_ids)

        async def all_of_them():
            async with company(service):
                return await asyncio.gather(
                    *(write(service, prompt, (), replace(GREEDY, max_tokens=32)) for prompt in prompts)
                )

        for prompt, got in zip(prompts, asyncio.run(all_of_them()), strict=True):
            assert agree(target, prompt, got, wanted[tuple(prompt)])
    finally:
        service.shutdown()


def chances(reference, prompt, draft, cuts):
    """P(correct) at each cut, from a conversation of its own."""
    found = []
    for cut in cuts:
        logits = plain(reference, [*prompt, *draft[:cut], *CHECK.token_ids])[-1].double().exp()
        yes, no = (
            sum(float(logits[token]) for token in words)
            for words in (CHECK.correct_token_ids, CHECK.incorrect_token_ids)
        )
        found.append(yes / (yes + no))
    return found


def test_verdicts_are_those_of_separate_conversations_whoever_else_is_served(service, reference):
    rng = random.Random(1)
    cases = []
    for _ in range(25):
        prompt, draft = text(rng, rng.randint(1, 60)), text(rng, rng.randint(1, 60))
        cases.append((prompt, draft, sorted(rng.sample(range(1, len(draft) + 1), min(len(draft), 5)))))

    async def all_of_them():
        async with company(service):
            asked = (service.judge(*case, CHECK, logprobs=2 if index % 2 else None) for index, case in enumerate(cases))
            return await asyncio.gather(*asked)

    spread = []
    for index, (case, got) in enumerate(zip(cases, asyncio.run(all_of_them()), strict=True)):
        prompt, draft, cuts = case
        wanted = chances(reference, *case)
        spread += wanted
        assert got.correct == pytest.approx(wanted, abs=1e-4)
        if index % 2:
            rows = plain(reference, [*prompt, *draft]).log_softmax(-1)[len(prompt) - 1 :]
            own = [float(row[token]) for row, token in zip(rows, draft[: cuts[-1]], strict=False)]
            assert [logprob.logprob for logprob in got.logprobs] == pytest.approx(own, abs=1e-4)
            assert all(len(logprob.top) == 2 for logprob in got.logprobs)
        else:
            assert got.logprobs == ()
    assert max(spread) - min(spread) > 0.5, "verdicts hardly differ on this model"


def test_seeds_reproduce_texts_whoever_else_is_served(service):
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

    async def go_on(prompt, sampling, whole):
        """The rest from every third place, with proposals right, wrong and partly right."""
        for split in range(0, len(whole), 3):
            guess = whole[split : split + rng.randint(0, 9)] + text(rng, rng.randint(0, 5))
            assert whole[:split] + await write(service, prompt, whole[:split], sampling, proposal=guess) == whole

    async def all_of_them():
        alone = [await write(service, prompt, (), sampling) for prompt, sampling in cases]
        async with company(service):
            together = await asyncio.gather(*(write(service, prompt, (), sampling) for prompt, sampling in cases))
            assert together == alone
            await asyncio.gather(*(go_on(*case, whole) for case, whole in zip(cases, alone, strict=True)))
        other = [await write(service, prompt, (), replace(sampling, seed=99)) for prompt, sampling in cases]
        assert sum(one != two for one, two in zip(alone, other, strict=True)) > 8

    asyncio.run(all_of_them())


def test_log_probabilities_are_those_of_the_text_run_at_once(service, reference):
    prompt = text(random.Random(3), 30)
    pieces = asyncio.run(
        collect(service.generate(prompt, (), SamplingParams(seed=5, temperature=0.5, max_tokens=12, logprobs=3)))
    )
    written = ids(pieces)
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    rows = plain(reference, [*prompt, *written]).log_softmax(-1)[len(prompt) - 1 :]
    for row, token, got in zip(rows, written, logprobs, strict=False):
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in got.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert len(logprobs) == len(written)


def test_a_stop_string_ends_the_text_in_whatever_tokens_it_comes(service, tokenizer):
    prompt = text(random.Random(4), 20)

    async def all_of_them():
        sampling = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
        whole = await write(service, prompt, (), sampling)
        said = tokenizer.decode(whole, skip_special_tokens=True)
        across = 0
        for stop in {said[start : start + 4] for start in range(len(said) - 4)}:
            needed = next(n for n in count() if stop in tokenizer.decode(whole[:n], skip_special_tokens=True))
            if needed <= 2 or "\ufffd" in stop:
                continue
            pieces = await collect(service.generate(prompt, whole[:2], replace(sampling, stop=("never", stop))))
            assert whole[:2] + ids(pieces) == whole[:needed]
            assert pieces[-1].finish == "stop"
            across += stop not in [tokenizer.decode([token]) for token in whole]
        assert across > 10

    asyncio.run(all_of_them())


def test_limits_count_the_whole_output(service):
    prompt = text(random.Random(5), 20)

    async def all_of_them():
        whole = await write(service, prompt, (), SamplingParams(max_tokens=20, ignore_eos=True))
        assert len(whole) == 20
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        assert len(await write(service, prompt, whole[:13], sampling)) == 7
        pieces = await collect(service.generate(prompt, whole[:13], sampling, proposal=whole[13:] + whole))
        assert (ids(pieces), pieces[-1].finish) == (whole[13:], "length")
        full = await write(service, prompt, (), SamplingParams(ignore_eos=True))
        assert len(prompt) + len(full) == CONTEXT

    asyncio.run(all_of_them())


def test_the_end_token_ends_the_text_and_is_no_part_of_it(service):
    """The bias makes it certain."""
    prompt, end = text(random.Random(6), 20), max(service.model.ends)

    async def all_of_them():
        biased = SamplingParams(logit_bias={end: 100.0}, max_tokens=5)
        (piece,) = await collect(service.generate(prompt, (), biased))
        assert (piece.ids, piece.finish) == ((), "stop")
        assert await write(service, prompt, (), replace(biased, ignore_eos=True)) == [end] * 5

    asyncio.run(all_of_them())


@pytest.fixture
def slow(path, monkeypatch):
    """A service of which a step takes a while."""
    service = load_native_engine(settings(path, step_tokens=4, max_running=2))
    forward = service.model.forward

    def slowly(*step):
        time.sleep(0.01)
        return forward(*step)

    monkeypatch.setattr(service.model, "forward", slowly)
    yield service
    service.shutdown()


def test_to_leave_early_cancels(slow):
    rng = random.Random(7)
    prompt = text(rng, 3)

    async def leave():
        async for piece in slow.generate(prompt, (), SamplingParams(ignore_eos=True)):
            assert piece.finish is None
            break

    async def close():
        stream = slow.generate(prompt, (), SamplingParams(ignore_eos=True))
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
            run_away(slow.judge(prompt, text(rng, 190), [190], CHECK)),
            run_away(slow.warm(text(rng, 200))),
        ):
            before = slow.load.steps
            await leaving
            await at_rest(slow)
            assert slow.load.steps - before < 30, "that is what it would have taken to the end"

    asyncio.run(all_of_them())


def test_who_is_cancelled_by_somebody_else_is_told(slow):
    async def cancelled():
        stream = slow.generate([20], (), SamplingParams(ignore_eos=True))
        await anext(stream)
        (job,) = slow.engine._running
        slow.engine.cancel(job)
        with pytest.raises(RequestCancelled):
            async for _ in stream:
                pass

    asyncio.run(cancelled())


def test_slow_readers_get_all_that_was_written_since_in_one_piece(service):
    prompt = text(random.Random(10), 20)

    async def all_of_them():
        sampling = SamplingParams(seed=3, max_tokens=40, ignore_eos=True, logprobs=0)
        whole = await write(service, prompt, (), sampling)
        stream = service.generate(prompt, (), sampling)
        first = await anext(stream)
        await at_rest(service)
        (rest,) = [piece async for piece in stream]
        assert ids([first, rest]) == whole
        assert (len(first.logprobs), len(rest.logprobs)) == (len(first.ids), len(rest.ids))
        assert (first.finish, rest.finish) == (None, "length")
        steps = service.load.steps
        task = asyncio.create_task(collect(service.generate(prompt, (), sampling, proposal=whole[:25])))
        await asyncio.sleep(0)
        while service.load.steps < steps + 15 or service.load.running:
            time.sleep(0.01)  # nobody reads
        (piece,) = await task
        assert (list(piece.ids), piece.accepted, len(piece.logprobs)) == (whole, 25, 40)

    asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("prompt", lambda s: s.warm([])),
        ("prompt", lambda s: s.warm([-1])),
        ("prompt", lambda s: s.warm([1, 510])),
        ("prompt", lambda s: s.warm([1] * (CONTEXT + 1))),
        ("prompt", lambda s: s.warm([1.5])),
        ("prompt", lambda s: s.warm(["a"])),
        ("prompt", lambda s: s.warm(list(np.array([range(20)]).T))),
        ("prompt", lambda s: write(s, [])),
        ("prompt", lambda s: write(s, [1, 510])),
        ("prompt", lambda s: write(s, [1] * CONTEXT)),
        ("prompt", lambda s: write(s, [1] * 150, [1] * 50)),
        ("output", lambda s: write(s, [1], [-1])),
        ("output", lambda s: write(s, [1], [1] * 5, SamplingParams(max_tokens=5))),
        ("output", lambda s: write(s, [10], s.model.tokenizer.encode("a STOP"), SamplingParams(stop=("STOP",)))),
        ("proposal", lambda s: write(s, [1], proposal=[510])),
        ("logit_bias", lambda s: write(s, [1], (), SamplingParams(logit_bias={510: 1.0}))),
        ("prompt", lambda s: s.judge([], [1], [1], CHECK)),
        ("prompt", lambda s: s.judge([510], [1], [1], CHECK)),
        ("draft", lambda s: s.judge([1], [510], [1], CHECK)),
        ("draft", lambda s: s.judge([1] * 100, [1] * 101, [1], CHECK)),
        ("cuts", lambda s: s.judge([1], [1, 1], [0], CHECK)),
        ("cuts", lambda s: s.judge([1], [1, 1], [3], CHECK)),
        ("cuts", lambda s: s.judge([1], [1, 1], [2, 1], CHECK)),
        ("cuts", lambda s: s.judge([1], [1, 1], [1, 1], CHECK)),
        ("check", lambda s: s.judge([1], [1, 1], [1], replace(CHECK, token_ids=(1, 510)))),
        ("check", lambda s: s.judge([1], [1, 1], [1], replace(CHECK, token_ids=()))),
        ("check", lambda s: s.judge([1], [1, 1], [1], replace(CHECK, correct_token_ids=(-1,)))),
        ("check", lambda s: s.judge([1], [1, 1], [1], replace(CHECK, incorrect_token_ids=()))),
    ],
)
def test_bad_input_is_refused_by_the_name_of_its_field_and_harms_nobody(service, field, call):
    async def refused():
        other = asyncio.create_task(write(service, [20, 30], (), replace(GREEDY, max_tokens=6, ignore_eos=True)))
        with pytest.raises(RequestError, match=f"^{field}: ") as caught:
            await call(service)
        assert caught.value.field == field
        assert len(await other) == 6

    asyncio.run(refused())


def test_what_is_just_within_the_limits_is_served(service, reference):
    rng = random.Random(11)

    async def all_of_them():
        await service.warm(text(rng, CONTEXT))
        assert len(await write(service, text(rng, CONTEXT - 1))) <= 1
        prompt, draft = text(rng, 100), text(rng, 100)
        cuts = list(range(1, 101))
        verdict = await service.judge(prompt, draft, cuts, CHECK)
        assert verdict.correct == pytest.approx(chances(reference, prompt, draft, cuts), abs=1e-4)
        assert (await service.judge(prompt, draft, [], CHECK)).correct == ()

    asyncio.run(all_of_them())


def test_no_question_reaches_beyond_the_positions_a_model_knows(tokenizer, tmp_path):
    build("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rng = random.Random(13)
    service = load_native_engine(settings(tmp_path, max_context=4096))
    try:
        assert service.max_model_len == 256
        prompt, draft = text(rng, 100), text(rng, 156)
        wanted = chances(reference, prompt, draft, [3, 153])
        for options in ({}, dict(full=0.0), dict(logprobs=0)):
            verdict = asyncio.run(service.judge(prompt, draft, [3, 153, 154, 156], CHECK, **options))
            assert verdict.p_correct == (*(pytest.approx(chance, abs=1e-4) for chance in wanted), None, None)
            assert len(verdict.logprobs) == (156 if options == dict(logprobs=0) else 0)
        assert asyncio.run(service.judge(prompt, draft, [155], CHECK, full=0.5)).p_correct == (None,)
        assert len(asyncio.run(write(service, text(rng, 250), (), replace(GREEDY, ignore_eos=True)))) == 6
    finally:
        service.shutdown()


def test_each_call_begins_where_the_one_before_left_off(path):
    """warm, judge, generate, and the next turn: each recomputes less than a block of 16."""
    rng = random.Random(12)
    prompt, draft = text(rng, 60), text(rng, 40)
    service = load_native_engine(settings(path))

    async def computed(work):
        before = service.stats.num_tokens
        result = await work
        await at_rest(service)
        return result, service.stats.num_tokens - before

    async def all_of_them():
        assert (await computed(service.warm(prompt)))[1] == 60
        assert (await computed(service.warm(prompt)))[1] <= 16
        probes = 3 * len(CHECK.token_ids)
        assert (await computed(service.judge(prompt, draft, [10, 20, 40], CHECK)))[1] <= 40 + probes + 16
        assert (await computed(service.judge(prompt, draft, [20, 30, 40], CHECK)))[1] <= probes + 16
        sampling = SamplingParams(max_tokens=30, ignore_eos=True)
        written, tokens = await computed(write(service, prompt, draft[:20], sampling))
        assert len(written) == 10
        assert tokens <= 10 + 16
        # What was said is there for the next turn, even where it was proposed and taken all at once.
        whole = [*prompt, *draft[:20], *written, *text(rng, 10)]
        assert (await computed(service.warm(whole)))[1] <= 10 + 16
        said = await write(service, whole, (), sampling)
        other = load_native_engine(settings(path))
        try:
            await write(other, whole, (), sampling, proposal=said)
            before = other.stats.prefix_hits
            await other.warm([*whole, *said, 9])
            assert other.stats.prefix_hits - before >= len(whole) + len(said) - 16
        finally:
            other.shutdown()

    try:
        asyncio.run(all_of_them())
    finally:
        service.shutdown()


def test_to_close_ends_all_streams(slow):
    async def all_of_them():
        streams = [slow.generate([20 + n] * 9, (), SamplingParams(ignore_eos=True)) for n in range(5)]
        tasks = [asyncio.create_task(collect(stream)) for stream in streams]
        await asyncio.sleep(0)
        slow.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {EngineStopped}
        for call in (slow.warm([1]), write(slow, [1]), slow.judge([1], [1], [1], CHECK)):
            with pytest.raises(EngineStopped):
                await call

    asyncio.run(all_of_them())


def test_a_service_that_cannot_be_is_refused_with_the_reason(tmp_path):
    with pytest.raises(RequestError, match="memory_mb: 8 hold no context of 600 tokens, that takes 23"):
        load_native_engine(settings(MODELS / "demo-target", memory_mb=8, max_context=600))
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_native_engine(settings(tmp_path / "nowhere"))


def test_the_question_of_the_chat_template_is_one_that_can_be_asked(service, tokenizer):
    prompt = chat_prompt_token_ids(tokenizer, [{"role": "user", "content": draw_problem("test", 1, 0).question}])
    draft = tokenizer.encode(correct_answer(draw_problem("test", 1, 0)))[:20]
    check = build_verification_suffix(tokenizer, "Is it right?")
    verdict = asyncio.run(service.judge(prompt, draft, [10, 20], check))
    assert all(chance is not None and 0 <= chance <= 1 for chance in verdict.correct)


def test_every_call_tells_how_much_it_found_known(path):
    service = load_native_engine(settings(path))
    prompt, draft = text(random.Random(1), 40), text(random.Random(2), 20)
    sampling = replace(GREEDY, max_tokens=len(draft) + 2, ignore_eos=True)

    async def calls():
        cold = await service.warm(prompt)
        again = await service.warm(prompt)
        judged = await service.judge(prompt, draft, [len(draft)], CHECK)
        written = await collect(service.generate(prompt, draft, sampling))
        return cold, again, judged.num_cached_tokens, written

    cold, again, judged, written = asyncio.run(calls())
    service.shutdown()
    assert (cold, again, judged) == (0, len(prompt), len(prompt))
    assert written[0].cached == len(prompt) + len(draft) - 1  # its last token is asked for anew
    assert all(piece.cached == 0 for piece in written[1:])
