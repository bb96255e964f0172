import asyncio
import random
from copy import deepcopy

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from parse.config import EngineSettings
from parse.engines.native import model, paged_attention
from parse.engines.native.generation import TreeInput, generate, prefill
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import PagedAttention, kernel_supports
from parse.engines.native.prefix_cache import PrefixCache, SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.engines.native.scheduler import Scheduler
from parse.engines.native_loader import load_native_engine
from parse.errors import RequestCancelled, RequestError
from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, VerifyRequest
from parse.tree import suffix_forest, tree_from_parents, trunk_with_suffixes
from parse.types import SamplingParams
from tests.parse.engines.native.tiny import VOCABULARY, WINDOW, alone, build, paused, plain, run_trees, serving, submit

KINDS = "llama", "qwen3", "mistral", "gemma3_text", "deepseek_v3"
ATOL = 1e-4

gpu = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)


def random_tokens(rng, size):
    return [rng.randrange(VOCABULARY) for _ in range(size)]


class Bench:
    """Runs steps on sequences whose blocks are dealt out at random."""

    def __init__(self, network, tokenizer, block_size, device="cpu"):
        self.model = Model(network.to(device), tokenizer)
        self.kv_cache = KVCache(32, block_size)
        self.free_blocks = random.Random(0).sample(range(32), 32)

    def sequence(self, tokens, num_extra_tokens=32):
        sequence = SequenceState(list(tokens))
        num_blocks = -(-(len(tokens) + num_extra_tokens) // self.kv_cache.block_size)
        sequence.block_ids = [self.free_blocks.pop() for _ in range(num_blocks)]
        return sequence

    def step(self, *parts):
        """The logits of each chunk's entries, on the CPU."""
        chunks = [ScheduledChunk(*part) for part in parts]
        tokens = [token for chunk in chunks for token in chunk.token_ids()]
        positions = [position for chunk in chunks for position in chunk.positions()]
        attention = PagedAttention(self.kv_cache, chunks)
        logits, _ = self.model.forward(tokens, positions, attention, None)
        return logits.cpu().split([len(chunk) for chunk in chunks])


def mixed_steps(bench, scale=1):
    """Runs several requests in a few steps of all kinds: returns the context, the tree and the logits of each."""
    rng = random.Random(1)
    long, middle, short, late = (random_tokens(rng, scale * size) for size in (41, 30, 19, 24))
    a, b, c, d = (bench.sequence(tokens) for tokens in (long, middle, short, late))
    decoded = random_tokens(rng, 2)
    verified = suffix_forest([len(long), 5, 16, len(long) - 8, 33], random_tokens(rng, 3))
    proposals, _ = tree_from_parents(random_tokens(rng, 7), [-1, 0, 0, -1, 3, 1, 4])
    trunk = trunk_with_suffixes(random_tokens(rng, 6), [2, 6], random_tokens(rng, 3))
    half = len(long) // 2
    bench.step((c, (), 0, len(short)), (a, (), 0, half), (d, (), 0, 6))
    bench.step((a, (), half, len(long)), (b, (), 0, 13))
    mixed = bench.step(
        (c, decoded[:1], len(short), len(short) + 1),  # a decoded token
        (b, (), 13, len(middle)),  # the rest of a prompt
        (a, verified, len(long), len(long) + len(verified)),  # verification suffixes
        (d, proposals, 6, len(late) + 3),  # the rest of a prompt and the beginning of a tree
    )
    c.token_ids.append(decoded[0])
    last = bench.step(
        (c, decoded[1:], len(short) + 1, len(short) + 2),
        (b, decoded[:1], len(middle), len(middle) + 1),
        (d, proposals, len(late) + 3, len(late) + 7),
    )
    [branched] = bench.step((c, trunk, len(short) + 1, len(short) + 1 + len(trunk)))
    return [
        (short, decoded, torch.cat([mixed[0], last[0]])),
        (middle, decoded[:1], last[1]),
        (long, verified, mixed[2]),
        (late, proposals, torch.cat([mixed[3][len(late) - 6 :], last[2]])),
        ([*short, decoded[0]], trunk, branched),
        (middle[:13], middle[13:], mixed[1]),
    ]


def expected_logits(network, prompt, nodes):
    if isinstance(nodes, list):
        return plain(network, [*prompt, *nodes])[len(prompt) :]
    return alone(network, prompt, nodes)


def kernel_by_its_contract(log):
    """`varlen_attn` with blocks, as its documentation says, one sequence and head after another."""

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
        assert num_splits == 1, "with blocks, split keys lose rows"
        groups = query.shape[1] // key.shape[2]
        assert groups == 1 or enable_gqa
        out = torch.full((*query.shape[:2], value.shape[-1]), torch.nan)
        left, right = window_size
        for i in range(count):
            first, last, used = int(cu_seq_q[i]), int(cu_seq_q[i + 1]), int(seqused_k[i])
            assert block_table.shape[1] * key.shape[1] >= used
            keys = torch.cat([key[block_id] for block_id in block_table[i]])[:used]
            values = torch.cat([value[block_id] for block_id in block_table[i]])[:used]
            place = torch.arange(used - (last - first), used)[:, None]  # the last query stands at the last key
            other = torch.arange(used)
            visible = torch.ones(last - first, used, dtype=torch.bool)
            if left >= 0:
                visible &= other >= place - left
            if right >= 0:
                visible &= other <= place + right
            for head in range(query.shape[1]):
                scores = query[first:last, head] @ keys[:, head // groups].T
                scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
                out[first:last, head] = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values[:, head // groups]
        log.append((max_q, window_size, count))
        return out

    return attend


@pytest.fixture
def kernel(monkeypatch):
    """Replaces the kernel, which a CPU lacks, and records how it is called."""
    log: list[tuple[int, tuple[int, int], int]] = []
    monkeypatch.setattr(paged_attention, "varlen_attn", kernel_by_its_contract(log))
    monkeypatch.setattr(paged_attention, "kernel_supports", lambda query, values: query.shape[-1] == values.shape[-1])
    return log


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_steps_on_scattered_blocks_give_the_logits_of_separate_sequences(kind, block_size, tokenizer):
    network = build(kind)
    reference = deepcopy(network)
    for prompt, nodes, logits in mixed_steps(Bench(network, tokenizer, block_size)):
        torch.testing.assert_close(logits, expected_logits(reference, prompt, nodes), atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_called_as_it_is_documented(kind, tokenizer, kernel):
    network = build(kind)
    reference = deepcopy(network)
    for prompt, nodes, logits in mixed_steps(Bench(network, tokenizer, 16)):
        torch.testing.assert_close(logits, expected_logits(reference, prompt, nodes), atol=ATOL, rtol=0)
    windows = {window for _, window, _ in kernel}
    if kind == "deepseek_v3":  # its values are narrower than its keys
        assert not kernel
    elif kind == "mistral":
        assert windows == {(WINDOW - 1, 0)}
    else:
        assert {(-1, 0), (-1, -1)} <= windows  # prompts, and steps of single tokens
    assert kind == "deepseek_v3" or {count for _, _, count in kernel} == {
        2,
        3,
    }  # causal chunks only, all those of a step at once


def test_slots_that_were_never_written_are_not_read(tokenizer, monkeypatch):
    allocate = KVCache._allocate
    monkeypatch.setattr(KVCache, "_allocate", lambda kv_cache, like: allocate(kv_cache, like).fill_(torch.nan))
    assert all(bool(logits.isfinite().all()) for *_, logits in mixed_steps(Bench(build("llama"), tokenizer, 16)))


def test_masks_and_slots_are_made_once_a_step(tokenizer, monkeypatch):
    built = []
    gathered, visible = paged_attention._GatheredChunks, ScheduledChunk.visibility

    def counted(*args):
        built.append("slots")
        return gathered(*args)

    def noted(chunk, window):
        built.append(window)
        return visible(chunk, window)

    monkeypatch.setattr(paged_attention, "_GatheredChunks", counted)
    monkeypatch.setattr(ScheduledChunk, "visibility", noted)
    bench = Bench(build("gemma3_text"), tokenizer, 8)  # of three layers, two have a window
    built.clear()
    sequence = bench.sequence(range(20))
    bench.step((sequence, (), 0, 20))
    assert built == ["slots", WINDOW, None]


@pytest.mark.parametrize(
    ("dtype", "width", "value_width", "block_size", "supported"),
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
def test_the_kernel_is_not_called_with_what_it_does_not_support(
    dtype, width, value_width, block_size, supported, monkeypatch
):
    query, values = torch.empty(3, 4, width, dtype=dtype), torch.empty(2, block_size, 2, value_width, dtype=dtype)
    assert not kernel_supports(query, values)  # not on a CPU
    monkeypatch.setattr(paged_attention, "_has_kernel", lambda device: True)
    assert kernel_supports(query, values) == supported


@pytest.mark.parametrize("has_block_tables", [True, False])
def test_the_kernel_is_not_called_if_it_takes_no_block_table(has_block_tables, monkeypatch):
    def kernel(query, key, value, *, scale=None):
        raise AssertionError

    def paged_kernel(query, key, value, *, scale=None, block_table=None):
        raise AssertionError

    monkeypatch.setattr(paged_attention, "varlen_attn", paged_kernel if has_block_tables else kernel)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert paged_attention._has_kernel.__wrapped__(torch.device("cuda")) == has_block_tables


def test_a_model_checks_itself_with_the_attention_of_its_device(tokenizer, kernel, monkeypatch):
    monkeypatch.setattr(model, "attention_for", lambda device: PagedAttention)
    Model(build("llama"), tokenizer)
    assert kernel == [(6, (-1, 0), 2)] * 4  # the causal step of the self-check, in each layer and at both positions


class Generation:
    """A request that generates tokens, and is cancelled when it has generated `abort_after` of them."""

    def __init__(self, engine, prompt, max_tokens, *, abort_after=None, **sampling_params):
        self.token_ids: list[int] = []

        def emit(delta):
            self.token_ids.extend(delta.token_ids)
            if abort_after is not None and len(self.token_ids) >= abort_after:
                engine.abort(self.response.request)

        self.response = submit(
            engine,
            prompt[:-1],
            generate(
                GenerateRequest(
                    prompt_token_ids=prompt,
                    sampling_params=SamplingParams(**dict(temperature=0.0) | sampling_params),
                ),
                eos_token_ids=(),
                max_new_tokens=max_tokens,
                emit=emit,
            ),
            max_tokens + 1,
        )


def outputs(engine):
    """Runs several requests at once: some share a prompt, and some verify it."""
    rng = random.Random(2)
    common = random_tokens(rng, 40)
    prompts = [
        *(common + random_tokens(rng, size) for size in (3, 9, 1)),
        *(random_tokens(rng, size) for size in (30, 5, 17)),
    ]
    tree = suffix_forest([10, 40, 25], random_tokens(rng, 4))
    with paused(engine):
        generations = [Generation(engine, prompt, 30) for prompt in prompts]
        verifications = [
            run_trees(engine, common, TreeInput(tree)),
            run_trees(engine, prompts[3], TreeInput(tokens := random_tokens(rng, 9)), TreeInput(tokens)),
        ]
        generations += [Generation(engine, prompt, 30, temperature=1.0, seed=7) for prompt in prompts]
    for each in generations:
        each.response.result()
    return [each.token_ids for each in generations], [logits for each in verifications for logits in each.result()]


@pytest.fixture
def preempted(monkeypatch):
    """Records how many tokens each request had when it was preempted."""
    log: list[int] = []
    inner = Scheduler.preempt

    def counted(scheduler, request):
        log.append(len(request.sequence.token_ids))
        inner(scheduler, request)

    monkeypatch.setattr(Scheduler, "preempt", counted)
    return log


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_change_no_output_even_where_requests_are_preempted(kind, tokenizer, preempted):
    tiny_model = Model(build(kind), tokenizer)
    with serving(tiny_model, max_sequences=14) as engine:
        ids, logits = outputs(engine)
    assert all(len(token_ids) == 30 for token_ids in ids)
    for layout in (dict(max_sequences=14), dict(max_sequences=2, sequence_capacity=104)):
        with serving(tiny_model, block_size=8, **layout) as engine:
            paged_ids, paged_logits = outputs(engine)
            assert paged_ids == ids
            for paged_row, row in zip(paged_logits, logits, strict=True):
                torch.testing.assert_close(paged_row, row, atol=ATOL, rtol=0)
            # A request for all blocks gets them: none was lost.
            prompt = random_tokens(random.Random(3), engine.max_sequence_length - 1)
            assert len(run_trees(engine, prompt, TreeInput([1])).result()) == 1
        assert bool(preempted) == (layout["max_sequences"] == 2)


def test_more_requests_fit_in_blocks_than_in_contiguous_rows(tokenizer):
    tiny_model = Model(build("llama"), tokenizer)
    running: list[int] = []
    for layout in ({}, dict(block_size=8)):
        with serving(tiny_model, max_sequences=2, **layout) as engine:
            with paused(engine):
                responses = [
                    run_trees(
                        engine, random_tokens(random.Random(i), 20), TreeInput([1]), TreeInput([2], accepted_path=(0,))
                    )
                    for i in range(8)
                ]
                submit(engine, [5], count_running(engine, running))
            for response in responses:
                response.result()
    assert running[0] <= 2 < running[1]


def count_running(engine, running):
    running.append(0)
    for _ in range(3):
        running[-1] = max(running[-1], engine.stats.num_running)
        yield TreeInput((), logits_nodes=())


def test_a_request_that_could_never_fit_is_refused_with_the_limit(tokenizer):
    with serving(Model(build("llama"), tokenizer), max_sequences=1, sequence_capacity=100, block_size=8) as engine:
        assert engine.max_sequence_length == 96
        with pytest.raises(RequestError, match=r"97 tokens.* holds 96"):
            run_trees(engine, random_tokens(random.Random(0), 96), TreeInput([1]))
        run_trees(engine, random_tokens(random.Random(0), 95), TreeInput([1])).result()


def test_an_engine_refuses_what_could_never_fit(tokenizer, tmp_path):
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = EngineSettings(model=str(tmp_path), device="cpu", max_model_len=64, kv_cache_memory_bytes=2**20)
    engine = load_native_engine(settings)
    try:
        suffix = VerificationSuffix(
            tuple(range(5, 405)) * 4, (1,), (2,)
        )  # longer than the memory that is reserved for suffixes
        with pytest.raises(RequestError, match=f"holds {engine.core.max_sequence_length}"):
            request = VerifyRequest(
                prompt_token_ids=[5, 6], draft_token_ids=[7, 8], prefix_lengths=[2], suffix=suffix, policy=None
            )
            asyncio.run(engine.verify(request))
    finally:
        engine.shutdown()


@pytest.mark.parametrize("layout", [{}, dict(block_size=8)])
def test_a_request_that_outgrows_its_announced_length_fails_alone(layout, tokenizer):
    network = build("llama")
    reference = deepcopy(network)

    def greedy():
        for _ in range(1000):
            yield TreeInput([1], accepted_path=(0,))

    with serving(Model(network, tokenizer), max_sequences=2, sequence_capacity=64, **layout) as engine:
        with paused(engine):
            outgrowing = submit(engine, random_tokens(random.Random(0), 40), greedy(), 4)
            other = run_trees(engine, [3, 4, 5], *[TreeInput([6], accepted_path=range(i > 0)) for i in range(50)])
        with pytest.raises(RequestError, match="64"):
            outgrowing.result()
        logits = torch.cat(other.result())
    torch.testing.assert_close(logits, plain(reference, [3, 4, 5, *[6] * 50])[3:], atol=ATOL, rtol=0)


def test_a_request_can_be_cancelled_while_it_is_preempted(tokenizer, monkeypatch):
    inner = Scheduler.preempt

    def cancelled(scheduler, request):
        inner(scheduler, request)
        request.cancelled = True

    monkeypatch.setattr(Scheduler, "preempt", cancelled)
    with serving(Model(build("llama"), tokenizer), max_sequences=1, sequence_capacity=64, block_size=8) as engine:
        with paused(engine):
            generations = [Generation(engine, random_tokens(random.Random(i), 20), 30) for i in range(2)]
        generations[0].response.result()
        with pytest.raises(RequestCancelled):
            generations[1].response.result()


def test_a_preempted_request_ends_when_others_have_computed_all_it_waits_for(tokenizer, monkeypatch):
    tokens = random_tokens(random.Random(0), 40)
    reservations = iter([True, False])  # succeeds for its first 19 tokens, fails for the next
    inner = Scheduler.preempt

    def computed_by_another(scheduler, request):
        inner(scheduler, request)
        twin = scheduler.prefix_cache.allocate(request.token_ids, 0)
        twin.num_computed_tokens = len(tokens)
        scheduler.prefix_cache.release(twin)

    with serving(Model(build("llama"), tokenizer), block_size=8) as engine:
        monkeypatch.setattr(Scheduler, "preempt", computed_by_another)
        monkeypatch.setattr(engine.scheduler.prefix_cache, "reserve", lambda sequence, length: next(reservations))
        submit(engine, tokens, prefill()).result()
        assert engine.stats.num_tokens == 19


def test_an_evicted_sequence_leaves_the_blocks_it_shares():
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


def check_half_precision(logits, exact):
    """Checks every row of [T, vocabulary].

    Half precision changes each row a little. A row that is lost or mixed up with another one differs completely.
    """
    errors = (logits - exact).abs().mean(-1) / exact.abs().mean(-1)
    assert float(errors.mean()) < 0.05
    assert float(errors.max()) < 0.25


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_in_single_precision_what_a_cpu_does(device, kind, tokenizer):
    reference = build(kind, max_position_embeddings=1024)
    for prompt, nodes, logits in mixed_steps(
        Bench(deepcopy(reference), tokenizer, paged_attention.BLOCK_SIZE, device), scale=9
    ):
        torch.testing.assert_close(logits, expected_logits(reference, prompt, nodes), atol=1e-3, rtol=0)


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
    for prompt, nodes, logits in mixed_steps(bench, scale=9):
        check_half_precision(logits, expected_logits(reference, prompt, nodes))
    assert bool(calls) == (kind != "deepseek_v3")


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_on_a_gpu_generates_what_one_on_a_cpu_does(device, kind, tokenizer):
    network = build(kind)
    with serving(Model(deepcopy(network), tokenizer), max_sequences=14) as engine:
        ids, _ = outputs(engine)
    with serving(Model(network.to(device), tokenizer), max_sequences=14) as engine:
        assert outputs(engine)[0] == ids
