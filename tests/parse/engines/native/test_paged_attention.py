import asyncio
import random
from copy import deepcopy

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from parse.config import EngineSettings
from parse.engines.loader import load_native_engine
from parse.engines.native import model, paged_attention
from parse.engines.native.engine import EngineCore
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import PagedAttention, kernel_supports
from parse.engines.native.prefix_cache import PrefixCache, SequenceState
from parse.engines.native.programs import TreeInput, generate, prefill
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.prompts import VerificationSuffix
from parse.tree import suffix_forest, tree_from_parents
from parse.types import RequestCancelled, RequestError, SamplingParams
from tests.parse.engines.native.tiny import VOCABULARY, WINDOW, alone, ask, build, paused, plain, serving, submit
from training.verification_tree import trunk_with_suffixes

KINDS = "llama", "qwen3", "mistral", "gemma3_text", "deepseek_v3"
ATOL = 1e-4

gpu = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)


def text(rng, size):
    return [rng.randrange(VOCABULARY) for _ in range(size)]


class Bench:
    """Contexts on pages dealt out at random, and steps run on them."""

    def __init__(self, network, tokenizer, page_size, device="cpu"):
        self.model = Model(network.to(device), tokenizer)
        self.memory = KVCache(32, page_size)
        self.free = random.Random(0).sample(range(32), 32)

    def context(self, tokens, room=32):
        context = SequenceState(list(tokens))
        needed = -(-(len(tokens) + room) // self.memory.block_size)
        context.block_ids = [self.free.pop() for _ in range(needed)]
        return context

    def step(self, *parts):
        """The logits of each span's entries, on the CPU."""
        spans = [ScheduledChunk(*part) for part in parts]
        tokens = [token for span in spans for token in span.token_ids()]
        positions = [position for span in spans for position in span.positions()]
        attention = PagedAttention(self.memory, spans)
        logits, _ = self.model.forward(tokens, positions, attention, None)
        return logits.cpu().split([len(span) for span in spans])


def mixed_steps(bench, scale=1):
    """Several requests in a few steps of all kinds: pairs of what was asked, as context and tree, and the logits."""
    rng = random.Random(1)
    long, middle, short, late = (text(rng, scale * size) for size in (41, 30, 19, 24))
    a, b, c, d = (bench.context(tokens) for tokens in (long, middle, short, late))
    said = text(rng, 2)
    judged = suffix_forest([len(long), 5, 16, len(long) - 8, 33], text(rng, 3))
    guesses, _ = tree_from_parents(text(rng, 7), [-1, 0, 0, -1, 3, 1, 4])
    trunk = trunk_with_suffixes(text(rng, 6), [2, 6], text(rng, 3))
    half = len(long) // 2
    bench.step((c, (), 0, len(short)), (a, (), 0, half), (d, (), 0, 6))
    bench.step((a, (), half, len(long)), (b, (), 0, 13))
    mixed = bench.step(
        (c, said[:1], len(short), len(short) + 1),  # a decoded token
        (b, (), 13, len(middle)),  # the rest of a prompt
        (a, judged, len(long), len(long) + len(judged)),  # probes
        (d, guesses, 6, len(late) + 3),  # the rest of a prompt and the beginning of a tree
    )
    c.tokens.append(said[0])
    last = bench.step(
        (c, said[1:], len(short) + 1, len(short) + 2),
        (b, said[:1], len(middle), len(middle) + 1),
        (d, guesses, len(late) + 3, len(late) + 7),
    )
    [branched] = bench.step((c, trunk, len(short) + 1, len(short) + 1 + len(trunk)))
    return [
        (short, said, torch.cat([mixed[0], last[0]])),
        (middle, said[:1], last[1]),
        (long, judged, mixed[2]),
        (late, guesses, torch.cat([mixed[3][len(late) - 6 :], last[2]])),
        ([*short, said[0]], trunk, branched),
        (middle[:13], middle[13:], mixed[1]),
    ]


def wanted(network, context, asked):
    if isinstance(asked, list):
        return plain(network, [*context, *asked])[len(context) :]
    return alone(network, context, asked)


def kernel_by_its_contract(log):
    """`varlen_attn` with pages, as its documentation says, one sequence and head after another."""

    def attend(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        count = len(cu_seq_q) - 1
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (cu_seq_q, cu_seq_k, seqused_k))
        assert cu_seq_k.shape == cu_seq_q.shape and seqused_k.shape == (count,)
        assert block_table.dtype == torch.int32 and len(block_table) == count and block_table.stride(-1) == 1
        assert key.shape == value.shape and key.ndim == 4 and query.stride(-1) == 1
        assert int(cu_seq_q[0]) == 0 and int(cu_seq_q[-1]) == len(query)
        assert int(cu_seq_q.diff().max()) == max_q and int(seqused_k.max()) == max_k
        assert torch.equal(cu_seq_k.diff(), seqused_k)
        assert num_splits == 1, "with pages, split keys lose rows"
        groups = query.shape[1] // key.shape[2]
        assert groups == 1 or enable_gqa
        out = torch.full((*query.shape[:2], value.shape[-1]), torch.nan)
        left, right = window_size
        for i in range(count):
            first, last, used = int(cu_seq_q[i]), int(cu_seq_q[i + 1]), int(seqused_k[i])
            assert block_table.shape[1] * key.shape[1] >= used
            keys = torch.cat([key[page] for page in block_table[i]])[:used]
            values = torch.cat([value[page] for page in block_table[i]])[:used]
            place = torch.arange(used - (last - first), used)[:, None]  # the last query stands at the last key
            other = torch.arange(used)
            seen = torch.ones(last - first, used, dtype=torch.bool)
            if left >= 0:
                seen &= other >= place - left
            if right >= 0:
                seen &= other <= place + right
            for head in range(query.shape[1]):
                scores = query[first:last, head] @ keys[:, head // groups].T
                scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
                out[first:last, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[:, head // groups]
        log.append((max_q, window_size, count))
        return out

    return attend


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, where there is none; what it was called with."""
    log: list[tuple[int, tuple[int, int], int]] = []
    monkeypatch.setattr(paged_attention, "varlen_attn", kernel_by_its_contract(log))
    monkeypatch.setattr(paged_attention, "kernel_serves", lambda query, values: query.shape[-1] == values.shape[-1])
    return log


@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_steps_on_scattered_pages_answer_as_separate_texts_do(kind, page_size, tokenizer):
    network = build(kind)
    reference = deepcopy(network)
    for context, asked, got in mixed_steps(Bench(network, tokenizer, page_size)):
        torch.testing.assert_close(got, wanted(reference, context, asked), atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_is_told_is_what_it_is_documented_to_take(kind, tokenizer, kernel):
    network = build(kind)
    reference = deepcopy(network)
    for context, asked, got in mixed_steps(Bench(network, tokenizer, 16)):
        torch.testing.assert_close(got, wanted(reference, context, asked), atol=ATOL, rtol=0)
    windows = {window for _, window, _ in kernel}
    if kind == "deepseek_v3":  # its values are narrower than its keys
        assert not kernel
    elif kind == "mistral":
        assert windows == {(WINDOW - 1, 0)}
    else:
        assert {(-1, 0), (-1, -1)} <= windows  # prompts, and steps of single tokens
    assert kind == "deepseek_v3" or {count for _, _, count in kernel} == {2, 3}  # texts only, all of a step at once


def test_memory_that_was_never_written_is_not_touched(tokenizer, monkeypatch):
    empty = KVCache._allocate
    monkeypatch.setattr(KVCache, "_empty", lambda memory, like: empty(memory, like).fill_(torch.nan))
    assert all(bool(got.isfinite().all()) for *_, got in mixed_steps(Bench(build("llama"), tokenizer, 16)))


def test_masks_and_slots_are_made_once_a_step(tokenizer, monkeypatch):
    made = []
    gathered, visible = paged_attention._GatheredChunks, ScheduledChunk.visibility

    def counted(*args):
        made.append("slots")
        return gathered(*args)

    def noted(span, window):
        made.append(window)
        return visible(span, window)

    monkeypatch.setattr(paged_attention, "_Gathered", counted)
    monkeypatch.setattr(ScheduledChunk, "visible", noted)
    bench = Bench(build("gemma3_text"), tokenizer, 8)  # of three layers, two have a window
    made.clear()
    context = bench.context(range(20))
    bench.step((context, (), 0, 20))
    assert made == ["slots", WINDOW, None]


@pytest.mark.parametrize(
    ("dtype", "width", "value_width", "page_size", "serves"),
    [
        (torch.bfloat16, 64, 64, 256, True),
        (torch.float16, 256, 256, 512, True),
        (torch.float32, 64, 64, 256, False),
        (torch.bfloat16, 24, 12, 256, False),
        (torch.bfloat16, 60, 60, 256, False),
        (torch.bfloat16, 264, 264, 256, False),
        (torch.bfloat16, 64, 64, 128, False),
    ],
)
def test_the_kernel_is_left_alone_with_what_it_does_not_take(dtype, width, value_width, page_size, serves, monkeypatch):
    query, values = torch.empty(3, 4, width, dtype=dtype), torch.empty(2, page_size, 2, value_width, dtype=dtype)
    assert not kernel_supports(query, values)  # not on a CPU
    monkeypatch.setattr(paged_attention, "_has_kernel", lambda device: True)
    assert kernel_supports(query, values) == serves


def test_a_model_checks_itself_in_the_way_of_its_device(tokenizer, kernel, monkeypatch):
    monkeypatch.setattr(model, "attention_on", lambda device: PagedAttention)
    Model(build("llama"), tokenizer)
    assert kernel == [(6, (-1, 0), 1)] * 2  # the plain part of what it asks, in each layer


class Writing:
    """A request that writes, and how it ended."""

    def __init__(self, engine, prompt, tokens, **sampling):
        self.ids: list[int] = []
        self.reply = submit(
            engine,
            prompt[:-1],
            generate(
                prompt,
                (),
                SamplingParams(**dict(temperature=0.0) | sampling),
                stop_token_ids=(),
                max_new_tokens=tokens,
                emit=lambda piece: self.ids.extend(piece.token_ids),
            ),
            tokens + 1,
        )


def outputs(engine):
    """Several requests at once, some of which share a prompt and some of which judge it."""
    rng = random.Random(2)
    common = text(rng, 40)
    prompts = [*(common + text(rng, size) for size in (3, 9, 1)), *(text(rng, size) for size in (30, 5, 17))]
    tree = suffix_forest([10, 40, 25], text(rng, 4))
    with paused(engine):
        writing = [Writing(engine, prompt, 30) for prompt in prompts]
        judging = [
            ask(engine, common, TreeInput(tree)),
            ask(engine, prompts[3], TreeInput(tokens := text(rng, 9)), TreeInput(tokens)),
        ]
        writing += [Writing(engine, prompt, 30, temperature=1.0, seed=7) for prompt in prompts]
    for each in writing:
        each.reply.result()
    return [each.ids for each in writing], [logits for each in judging for logits in each.result()]


@pytest.fixture
def set_back(monkeypatch):
    """How many tokens each request had when it was set back."""
    log: list[int] = []
    inner = EngineCore._preempt

    def counted(engine, job):
        log.append(len(job.context.tokens))
        inner(engine, job)

    monkeypatch.setattr(EngineCore, "_set_back", counted)
    return log


@pytest.mark.parametrize("kind", KINDS)
def test_pages_change_nothing_that_is_written_even_where_requests_must_be_set_back(kind, tokenizer, set_back):
    tiny = Model(build(kind), tokenizer)
    with serving(tiny, contexts=14) as engine:
        ids, logits = outputs(engine)
    assert all(len(written) == 30 for written in ids)
    for memory in (dict(contexts=14), dict(contexts=2, capacity=104)):
        with serving(tiny, page_size=8, **memory) as engine:
            paged_ids, paged_logits = outputs(engine)
            assert paged_ids == ids
            for got, row in zip(paged_logits, logits, strict=True):
                torch.testing.assert_close(got, row, atol=ATOL, rtol=0)
            # Whoever wants it all gets it: no page was lost.
            assert (
                len(ask(engine, text(random.Random(3), engine.max_sequence_length - 1), TreeInput([1])).result()) == 1
            )
        assert bool(set_back) == (memory["contexts"] == 2)


def test_pages_hold_more_requests_than_rows_do(tokenizer):
    tiny = Model(build("llama"), tokenizer)
    running: list[int] = []
    for pages in ({}, dict(page_size=8)):
        with serving(tiny, contexts=2, **pages) as engine:
            with paused(engine):
                replies = [
                    ask(engine, text(random.Random(i), 20), TreeInput([1]), TreeInput([2], accepted_path=(0,)))
                    for i in range(8)
                ]
                submit(engine, [5], watching(engine, running))
            for reply in replies:
                reply.result()
    assert running[0] <= 2 < running[1]


def watching(engine, running):
    running.append(0)
    for _ in range(3):
        running[-1] = max(running[-1], engine.load.running)
        yield TreeInput((), logits_nodes=())


def test_a_request_that_could_never_fit_is_refused_with_the_limit(tokenizer):
    with serving(Model(build("llama"), tokenizer), contexts=1, capacity=100, page_size=8) as engine:
        assert engine.max_sequence_length == 96
        with pytest.raises(RequestError, match=r"97 tokens.* the limit is 96"):
            ask(engine, text(random.Random(0), 96), TreeInput([1]))
        ask(engine, text(random.Random(0), 95), TreeInput([1])).result()


def test_a_service_refuses_what_could_never_fit(tokenizer, tmp_path):
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    service = load_native_engine(
        EngineSettings(model=str(tmp_path), device="cpu", max_model_len=64, kv_cache_memory_bytes=1 * 2**20)
    )
    try:
        check = VerificationSuffix(tuple(range(5, 405)) * 4, (1,), (2,))  # longer than all that is set aside for probes
        with pytest.raises(RequestError, match=f"the limit is {service.core.max_sequence_length}"):
            asyncio.run(service.judge([5, 6], [7, 8], [2], check))
    finally:
        service.shutdown()


@pytest.mark.parametrize("pages", [{}, dict(page_size=8)])
def test_a_request_that_outgrows_what_it_announced_fails_alone(pages, tokenizer):
    network = build("llama")
    reference = deepcopy(network)

    def greedy():
        for _ in range(1000):
            yield TreeInput([1], accepted_path=(0,))

    with serving(Model(network, tokenizer), contexts=2, capacity=64, **pages) as engine:
        with paused(engine):
            outgrowing = submit(engine, text(random.Random(0), 40), greedy(), 4)
            other = ask(engine, [3, 4, 5], *[TreeInput([6], accepted_path=range(i > 0)) for i in range(50)])
        with pytest.raises(RequestError, match="64"):
            outgrowing.result()
        got = torch.cat(other.result())
    torch.testing.assert_close(got, plain(reference, [3, 4, 5, *[6] * 50])[3:], atol=ATOL, rtol=0)


def test_a_request_can_be_cancelled_while_it_is_set_back(tokenizer, monkeypatch):
    inner = EngineCore._preempt

    def cancelled(engine, job):
        inner(engine, job)
        job.cancelled = True

    monkeypatch.setattr(EngineCore, "_set_back", cancelled)
    with serving(Model(build("llama"), tokenizer), contexts=1, capacity=64, page_size=8) as engine:
        with paused(engine):
            writing = [Writing(engine, text(random.Random(i), 20), 30) for i in range(2)]
        writing[0].reply.result()
        with pytest.raises(RequestCancelled):
            writing[1].reply.result()


def test_a_request_ends_when_others_have_computed_all_it_wanted_while_it_was_set_back(tokenizer, monkeypatch):
    tokens = text(random.Random(0), 40)
    grants = iter([True, False])  # for its first 19 tokens, and not for the next
    inner = EngineCore._preempt

    def computed_by_another(engine, job):
        inner(engine, job)
        twin = engine._cache.open(job.tokens, 0)
        twin.computed = len(tokens)
        engine._cache.close(twin)

    with serving(Model(build("llama"), tokenizer), page_size=8) as engine:
        monkeypatch.setattr(EngineCore, "_set_back", computed_by_another)
        monkeypatch.setattr(engine._prefix_cache, "reserve", lambda context, length: next(grants))
        submit(engine, tokens, prefill()).result()
        assert engine.stats.num_tokens == 19


def test_a_context_that_must_go_leaves_the_pages_it_shares():
    common, one, other = ([number] * 16 for number in range(3))
    cache = PrefixCache(3, 16, lambda source, target, count: None)
    first = cache.allocate([*common, *one, *one], 0)
    assert first is not None
    first.num_computed_tokens = 48
    cache.release(first)
    second = cache.allocate([*common, *other], 16)
    assert second is not None
    assert (second.num_computed_tokens, len(second.block_ids), cache.num_free_blocks, cache.num_cached_sequences) == (
        16,
        3,
        0,
        0,
    )


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_in_single_precision_what_a_cpu_does(device, kind, tokenizer):
    reference = build(kind, max_position_embeddings=1024)
    for context, asked, got in mixed_steps(
        Bench(deepcopy(reference), tokenizer, paged_attention.BLOCK_SIZE, device), scale=9
    ):
        torch.testing.assert_close(got, wanted(reference, context, asked), atol=1e-3, rtol=0)


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_computes_on_a_gpu_nearly_what_a_cpu_does(device, kind, tokenizer, monkeypatch):
    calls = []

    def counted(*args, **named):
        calls.append(1)
        return varlen_attn(*args, **named)

    monkeypatch.setattr(paged_attention, "varlen_attn", counted)
    reference = build(kind, max_position_embeddings=1024, initializer_range=0.1)
    bench = Bench(deepcopy(reference).bfloat16(), tokenizer, paged_attention.BLOCK_SIZE, device)
    for context, asked, got in mixed_steps(bench, scale=9):
        exact = wanted(reference, context, asked)
        assert float((got - exact).abs().mean()) < 0.05 * float(exact.abs().mean())
    assert bool(calls) == (kind != "deepseek_v3")


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_on_a_gpu_writes_what_one_on_a_cpu_does(device, kind, tokenizer):
    network = build(kind)
    with serving(Model(deepcopy(network), tokenizer), contexts=14) as engine:
        ids, _ = outputs(engine)
    with serving(Model(network.to(device), tokenizer), contexts=14) as engine:
        assert outputs(engine)[0] == ids
