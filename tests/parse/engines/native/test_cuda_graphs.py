"""Recorded steps. On a CPU a tape stands in for the device's graphs: it does again what was done to the very same
tensors, and none of the code that led to it runs a second time."""

import logging
import random
import threading
import time
from contextlib import contextmanager, suppress
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parse.engines.native import engine_core
from parse.engines.native import paged_attention
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.cuda_graphs import (
    CudaGraphs,
    CudaRecorder,
    ForbidHostSync,
    cuda_graphs_for,
    padded_batch_size,
)
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import CannotReplayError, DecodeAttention, PagedAttention
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.programs import TreeInput
from parse.engines.native.sampler import Sampler, sample, token_logprobs
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.tree import suffix_forest
from parse.types import RequestCancelled, SamplingParams
from tests.parse.engines.native.test_paged_attention import ATOL, Writing, gpu, outputs, random_tokens
from tests.parse.engines.native.tiny import SERVED, VOCABULARY, ask, build, paused, plain, serving

KERNEL = "llama", "qwen3", "mistral", "gemma3_text"  # whose attention can go by the kernel
PAGES = dict(max_sequences=14, block_size=8)


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.done.append((func, args, kwargs or {}, out))
        return out

    def play(self):
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(*map(tree_leaves, (out, again)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


class TapeRecorder:
    def __init__(self):
        self.rows: list[int] = []

    def warm_up(self, work):
        work()

    def record(self, work):
        with Tape() as tape:
            logits = work()
        self.rows.append(len(logits))
        logits.fill_(torch.nan)  # a graph that is recorded has computed nothing
        return logits, tape.play


@torch.library.custom_op("parse_tests::decode", mutates_args=())
def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    used: torch.Tensor,
    pages: torch.Tensor,
    most: int,
    scale: float,
    left: int,
) -> torch.Tensor:
    """What `varlen_attn` is documented to do with single tokens, one row and head after another."""
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (bounds, key_bounds, used, pages))
    assert bounds.tolist() == list(range(len(query) + 1))
    assert torch.equal(key_bounds.diff(), used)
    assert int(used.max()) <= most <= pages.shape[1] * keys.shape[1]
    out = torch.empty_like(query)
    groups = query.shape[1] // keys.shape[2]
    for row, length in enumerate(used.tolist()):
        first = max(0, length - 1 - left) if left >= 0 else 0
        key, value = (memory[pages[row]].flatten(0, 1)[first:length] for memory in (keys, values))
        for head in range(query.shape[1]):
            scores = key[:, head // groups] @ query[row, head] * scale
            out[row, head] = scores.softmax(0) @ value[:, head // groups]
    return out


@pytest.fixture
def recorder(monkeypatch):
    """Engines that are to record do so on tape, and the kernel is there for what they record."""
    tape = TapeRecorder()

    def kernel(query, keys, values, bounds, key_bounds, most_queries, most_keys, *, scale, window_size, **named):
        assert most_queries == 1 and named["num_splits"] == 1 and named["enable_gqa"]
        assert window_size in ((-1, -1), (6, 0))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        used, pages = named["seqused_k"], named["block_table"]
        return decode(query, keys, values, bounds, key_bounds, used, pages, most_keys, scale, window_size[0])

    inner = DecodeAttention.attend

    def with_kernel(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_attention, "kernel_serves", lambda query, values: query.shape[-1] == values.shape[-1])
            patch.setattr(paged_attention, "varlen_attn", kernel)
            return inner(*args)

    def on_tape(model, memory, spare, longest):
        return CudaGraphs(model, memory, spare, longest, tape)

    monkeypatch.setattr(DecodeAttention, "attend", with_kernel)
    monkeypatch.setattr(engines, "graphs_for", on_tape)
    return tape


@contextmanager
def counted(engine):
    """How many of its steps are replayed."""
    inner, replayed = engine._graphs.replay, []

    def replay(spans):
        if (logits := inner(spans)) is not None:
            replayed.append(len(spans))
        return logits

    engine._graphs.replay = replay
    yield replayed


@pytest.mark.parametrize("kind", KERNEL)
def test_replayed_steps_write_what_ordinary_ones_do(kind, tokenizer, recorder):
    """With prompts shared, requests of different lengths that come and go, trees between, and all kinds of sampling."""
    tiny = Model(build(kind), tokenizer)
    with serving(tiny, **PAGES) as engine:
        wanted = outputs(engine)
    for memory in (PAGES, dict(max_sequences=2, sequence_capacity=104, block_size=8)):  # in the second some are set back
        with serving(tiny, **memory, cuda_graphs=True) as engine, counted(engine) as replayed:
            for _ in range(2):
                ids, logits = outputs(engine)
                assert ids == wanted[0]
                for got, row in zip(logits, wanted[1], strict=True):
                    torch.testing.assert_close(got, row, atol=ATOL, rtol=0)
        assert len(replayed) > 30
        assert len(set(replayed)) > 2
    assert set(recorder.rows) <= {1, 2, 4, 8}


def test_numbers_of_rows_are_recorded_once_and_few(tokenizer, recorder):
    with serving(Model(build("llama"), tokenizer), **PAGES, cuda_graphs=True) as engine:
        for count in (3, 1, 4, 2, 3, 4):
            with paused(engine):
                writing = [Writing(engine, random_tokens(random.Random(i), 9), 6) for i in range(count)]
            for each in writing:
                each.reply.result()
    assert sorted(recorder.rows) == sorted(set(recorder.rows))
    assert [padded_batch_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 33, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]


def test_who_leaves_a_replayed_step_leaves_the_others_as_they_were(tokenizer, recorder):
    network = build("llama")
    reference = deepcopy(network)
    said = [7] * 60
    with serving(Model(network, tokenizer), **PAGES, cuda_graphs=True) as engine, counted(engine) as replayed:
        with paused(engine):
            writing = [Writing(engine, random_tokens(random.Random(seed), 20), 90) for seed in range(3)]
            reply = ask(
                engine, [3, 4, 5], *[TreeInput([token], accepted_path=range(i > 0)) for i, token in enumerate(said)]
            )
        for number, each in enumerate(writing):
            while len(each.ids) < 5 * number + 5:
                time.sleep(0.001)
            engine.abort(each.reply.request)
            assert isinstance(each.reply.wait().error, RequestCancelled)
        got = torch.cat(reply.result())
        torch.testing.assert_close(got, plain(reference, [3, 4, 5, *said])[3:], atol=ATOL, rtol=0)
        assert max(replayed) == 4 and min(replayed) == 1
        assert engine.stats.num_replayed_steps == len(replayed)


def test_what_is_asked_for_in_several_steps_outlives_those_that_are_replayed_between(tokenizer, recorder):
    network = build("llama")
    reference = deepcopy(network)
    said = [7, 8, 9, 10, 11, 12]
    with serving(Model(network, tokenizer), **PAGES, max_num_batched_tokens=1, cuda_graphs=True) as engine, counted(engine) as replayed:
        got = torch.cat(
            ask(engine, [3, 4, 5], TreeInput(said[:3]), TreeInput(said[3:], accepted_path=range(3))).result()
        )
    torch.testing.assert_close(got, plain(reference, [3, 4, 5, *said])[3:], atol=ATOL, rtol=0)
    assert replayed == [1] * 5


def test_rows_that_nobody_needs_write_to_no_page_that_is_somebodys(tokenizer, recorder):
    with serving(Model(build("llama"), tokenizer), max_sequences=2, sequence_capacity=16, block_size=8, cuda_graphs=True) as engine:
        for _ in range(3):
            with paused(engine):
                writing = [Writing(engine, [seed], 6) for seed in range(3)]
            for each in writing:
                each.reply.result()
        assert engine.stats.blocks_total == 4
        memory = engine._kv_cache
        assert 4 in recorder.rows
        written = [bool(memory.keys[0][8 * page : 8 * page + 8].any()) for page in range(memory.num_blocks)]
        assert written == [True, True, True, False, True]  # the spare one last
        assert not bool(memory.keys[0][33:].any())  # and only at its beginning


def test_a_recording_that_gives_something_else_is_never_used(tokenizer, recorder, monkeypatch, caplog):
    inner = recorder.record

    def wrong(work):
        logits, play = inner(work)
        return logits, lambda: (play(), logits.mul_(-1))

    monkeypatch.setattr(recorder, "record", wrong)
    refused(tokenizer, "llama", caplog, "logits differ")


def test_what_cannot_be_recorded_goes_the_ordinary_way_and_says_so_once(tokenizer, recorder, caplog):
    refused(tokenizer, "deepseek_v3", caplog, "does not go by the kernel")


def test_a_device_that_fails_to_record_is_asked_once_for_each_number_of_rows(tokenizer, recorder, monkeypatch, caplog):
    def failing(work):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recorder, "record", failing)
    refused(tokenizer, "llama", caplog, "out of memory", times=2)


def refused(tokenizer, kind, caplog, reason, times=1):
    tiny = Model(build(kind), tokenizer)
    with serving(tiny, **PAGES) as engine:
        wanted = [written(engine, count) for count in (1, 2)]
    with (
        caplog.at_level(logging.WARNING),
        serving(tiny, **PAGES, cuda_graphs=True) as engine,
        counted(engine) as replayed,
    ):
        assert [written(engine, count) for count in (1, 2)] == wanted
    assert not replayed
    assert len(caplog.records) == times
    assert reason in caplog.text


def written(engine, count):
    with paused(engine):
        writing = [Writing(engine, random_tokens(random.Random(seed), 12), 10) for seed in range(count)]
    for each in writing:
        each.reply.result()
    return [each.ids for each in writing]


@pytest.mark.parametrize("kind", SERVED)
def test_no_model_that_is_served_asks_its_device_for_a_value_while_it_decodes(kind, tokenizer):
    """Else it could not be recorded; and here each step would wait for the device once more."""

    class Blind:
        def attend(self, layer, query, key, value, scale, window):
            return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])

    tiny = Model(build(kind), tokenizer)
    rows = torch.tensor([[1, 2, 3], [5, 6, 2]])
    with torch.inference_mode(), ForbidHostSync():
        tiny.forward_tensors(rows[:1], rows[1:], Blind(), 0)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: bool((x > 0).all()),
        lambda x: x.index_put_((x > 0,), torch.tensor([1.0])),
        lambda x: x.to("meta"),
    ],
)
def test_whatever_asks_the_device_for_a_value_is_found(asks):
    for inference in (False, True):
        with torch.inference_mode(inference), pytest.raises(CannotReplayError), ForbidHostSync():
            asks(torch.zeros(4))


def test_what_stays_on_the_device_may_be_recorded():
    with torch.inference_mode(), ForbidHostSync():
        x = torch.arange(4.0)
        x[torch.tensor([1, 2])] = x[torch.tensor([3, 0])] * 2 + torch.tensor(1.0)
        x.copy_(x.to(torch.bfloat16).cumsum(0))
    assert x.tolist() == [0.0, 7.0, 8.0, 11.0]


class OneDevice(TorchDispatchMode):
    """Refuses mixtures, as GPUs do; single numbers may come from anywhere, and so may what is copied."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            assert len({tensor.device for tensor in tensors}) <= 1, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("kind", KERNEL)
def test_what_lies_on_a_device_meets_nothing_that_lies_elsewhere(kind, by_kernel, tokenizer, monkeypatch):
    """Seen on the device that computes nothing."""
    meta = torch.device("meta")
    with meta:
        network = build(kind, max_position_embeddings=1024).bfloat16()
    monkeypatch.setattr(
        "parse.engines.native.model.speed_up", lambda *_, **__: 0
    )  # compares, and here is nothing to compare
    monkeypatch.setattr(Model, "_self_check", lambda tiny: tiny._attend_with(STEP_ATTENTION))
    monkeypatch.setattr(paged_attention, "_has_kernel", lambda device: by_kernel)
    tiny, memory = Model(network, tokenizer), KVCache(9, paged_attention.BLOCK_SIZE)
    contexts = [SequenceState(list(range(100))) for _ in range(4)]
    for number, context in enumerate(contexts):
        context.block_ids = [2 * number, 2 * number + 1]
    (a, b, c, d), forest = contexts, suffix_forest([10, 90], [1, 2, 3])
    spans = [
        ScheduledChunk(a, [5], 100, 101),
        ScheduledChunk(b, [6], 100, 101),
        ScheduledChunk(c, (), 0, 60),
        ScheduledChunk(d, forest, 100, 106),
    ]
    tokens = [token for span in spans for token in span.token_ids()]
    positions = [position for span in spans for position in span.positions()]
    with torch.inference_mode(), OneDevice():
        logits, _ = tiny.forward(tokens, positions, PagedAttention(memory, spans), [0, 1, 64])
        assert (logits.device, logits.shape) == (meta, (3, VOCABULARY))
        table = torch.zeros(4, 6, dtype=torch.long, device=meta)
        step = DecodeAttention(memory, table[:, 1], table[:, 2:])
        with ForbidHostSync(), suppress(*([] if by_kernel else [CannotReplayError])):
            assert tiny.forward_tensors(table[None, :, 0], table[None, :, 1], step, 0)[0].device == meta
    adjusted = dict(frequency_penalty=0.4, repetition_penalty=1.2, logit_bias={3: 1.0})
    everything = SamplingParams(top_p=0.9, top_k=5, min_p=0.1, **adjusted)  # type: ignore[arg-type]
    draws = [*Sampler(everything, [1, 2], [3]).states([0, 4]), *Sampler(SamplingParams(), [1], []).states()]
    for last_of_all in (lambda: sample(logits, draws), lambda: token_logprobs(logits, [1, 2, 3], 2)):
        with OneDevice(), pytest.raises(NotImplementedError, match="out of meta") as caught:
            last_of_all()
        assert any("tolist()" in str(entry.statement) for entry in caught.traceback)  # nothing is asked for before


def test_on_a_cpu_nothing_is_recorded(tokenizer):
    tiny = Model(build("llama"), tokenizer)
    assert cuda_graphs_for(tiny, KVCache(2, 16), 1, 16) is None
    with serving(tiny, cuda_graphs=True) as engine:
        assert engine._cuda_graphs is None
        assert len(written(engine, 2)[0]) == 10


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KERNEL)
def test_on_a_gpu_replayed_steps_give_what_ordinary_ones_do(device, kind, tokenizer, caplog):
    network = build(kind, max_position_embeddings=1024, initializer_range=0.1)
    tiny = Model(network.bfloat16().to(device), tokenizer)
    contexts = [random_tokens(random.Random(seed), size) for seed, size in enumerate((700, 300, 20, 255, 256))]
    said = random_tokens(random.Random(9), 40)
    asks = [TreeInput([token], accepted_path=range(i > 0)) for i, token in enumerate(said)]
    sizes = dict(max_sequences=8, sequence_capacity=1024, max_num_batched_tokens=2048)
    answers = []
    for graphed in (False, True):
        with caplog.at_level(logging.WARNING), serving(tiny, **sizes, cuda_graphs=graphed) as engine:
            for _ in range(2):
                with paused(engine):
                    replies = [ask(engine, context, *asks[: 40 - 5 * i]) for i, context in enumerate(contexts)]
                answers.append([torch.cat(reply.result()) for reply in replies])
            if engine._cuda_graphs:
                assert sum(recording is not None for recording in engine._cuda_graphs._recordings.values()) >= 3
    assert not caplog.records
    for got in answers[1:]:
        for one, other in zip(got, answers[0], strict=True):
            assert float((one - other).abs().mean()) < 0.05 * float(other.abs().mean())


@pytest.mark.parametrize("device", [gpu])
def test_a_gpu_goes_on_after_a_recording_that_broke_off(device):
    x, recorder = torch.ones(3, device=device), CudaRecorder(torch.device(device))
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x + x.sum().item())
    assert torch.cuda.current_stream() == before
    recorder.warm_up(lambda: x + 1)
    y, replay = recorder.record(lambda: x + 1)
    x.fill_(4.0)
    replay()
    assert y.tolist() == [5.0] * 3


@pytest.mark.parametrize("device", [gpu])
def test_on_a_gpu_engines_of_one_process_record_beside_one_another(device, tokenizer, caplog):
    models = [Model(build("llama", seed).bfloat16().to(device), tokenizer) for seed in range(2)]
    wanted: dict[int, list] = {}
    got: dict[int, list] = {}

    def work(number, graphed, results):
        with serving(models[number], max_sequences=14, sequence_capacity=512, cuda_graphs=graphed) as engine:
            results[number] = [written(engine, count) for count in (1, 3, 2, 5, 5)]

    with caplog.at_level(logging.WARNING):
        for graphed, results in ((False, wanted), (True, got)):
            threads = [threading.Thread(target=work, args=(number, graphed, results)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not caplog.records
    assert {number: [len(ids) for run in runs for ids in run] for number, runs in got.items()} == {
        number: [len(ids) for run in runs for ids in run] for number, runs in wanted.items()
    }
    assert max(token for runs in got.values() for run in runs for ids in run for token in ids) < VOCABULARY
