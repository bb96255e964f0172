"""Recorded steps. On a CPU a tape replaces CUDA graphs: it repeats the operations on the very same tensors, and the
code that led to them does not run a second time."""

import logging
import random
import threading
from contextlib import contextmanager, suppress
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parse.engines.native import engine_core, paged_attention
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.cuda_graphs import (
    CudaGraphs,
    CudaRecorder,
    ForbidHostSync,
    cuda_graphs_for,
    padded_batch_size,
)
from parse.engines.native.generation import TreeInput
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import CannotReplayError, DecodeAttention, PagedAttention
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.sampler import Sampler, sample, token_logprobs
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.errors import RequestCancelled
from parse.tree import suffix_forest
from parse.types import SamplingParams
from tests.parse.engines.native.test_paged_attention import (
    ATOL,
    Generation,
    check_half_precision,
    gpu,
    outputs,
    random_tokens,
)
from tests.parse.engines.native.tiny import SERVED, VOCABULARY, build, paused, plain, run_trees, serving

KERNEL_MODELS = "llama", "qwen3", "mistral", "gemma3_text"  # the kernel supports their attention
PAGED = dict(max_sequences=14, block_size=8)


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
        self.batch_sizes: list[int] = []

    def warm_up(self, work):
        work()

    def record(self, work):
        with Tape() as tape:
            logits = work()
        self.batch_sizes.append(len(logits))
        logits.fill_(torch.nan)  # a graph that is recorded has computed nothing
        return logits, tape.play


@torch.library.custom_op("parse_tests::decode", mutates_args=())
def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    max_keys: int,
    scale: float,
    left: int,
) -> torch.Tensor:
    """What `varlen_attn` is documented to do with single tokens, one sequence and head after another."""
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (bounds, key_bounds, lengths, block_table))
    assert bounds.tolist() == list(range(len(query) + 1))
    assert torch.equal(key_bounds.diff(), lengths)
    assert int(lengths.max()) <= max_keys <= block_table.shape[1] * keys.shape[1]
    out = torch.empty_like(query)
    groups = query.shape[1] // keys.shape[2]
    for row, length in enumerate(lengths.tolist()):
        first = max(0, length - 1 - left) if left >= 0 else 0
        key, value = (blocks[block_table[row]].flatten(0, 1)[first:length] for blocks in (keys, values))
        for head in range(query.shape[1]):
            scores = key[:, head // groups] @ query[row, head] * scale
            out[row, head] = scores.softmax(0) @ value[:, head // groups]
    return out


@pytest.fixture
def recorder(monkeypatch):
    """Makes engines record on tape, and replaces the kernel in what they record."""
    tape = TapeRecorder()

    def kernel(query, keys, values, bounds, key_bounds, max_queries, max_keys, *, scale, window_size, **options):
        assert max_queries == 1 and options["num_splits"] == 1 and options["enable_gqa"]
        assert window_size in ((-1, -1), (6, 0))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        lengths, block_table = options["seqused_k"], options["block_table"]
        return decode(query, keys, values, bounds, key_bounds, lengths, block_table, max_keys, scale, window_size[0])

    inner = DecodeAttention.attend

    def with_kernel(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_attention, "kernel_supports", lambda query, values: query.shape[-1] == values.shape[-1])
            patch.setattr(paged_attention, "varlen_attn", kernel)
            return inner(*args)

    def on_tape(model, kv_cache, spare_block, max_model_len):
        return CudaGraphs(model, kv_cache, spare_block, max_model_len, tape)

    monkeypatch.setattr(DecodeAttention, "attend", with_kernel)
    monkeypatch.setattr(engine_core, "cuda_graphs_for", on_tape)
    return tape


@contextmanager
def counted(engine):
    """Collects the batch sizes of the replayed steps."""
    graphs = engine.model_runner.cuda_graphs
    inner, replayed = graphs.replay, []

    def replay(chunks):
        if (logits := inner(chunks)) is not None:
            replayed.append(len(chunks))
        return logits

    graphs.replay = replay
    yield replayed


@pytest.mark.parametrize("kind", KERNEL_MODELS)
def test_replayed_steps_give_the_output_of_ordinary_ones(kind, tokenizer, recorder):
    """Requests of different lengths share prompts, come and go, run trees in between, and sample in different ways."""
    tiny = Model(build(kind), tokenizer)
    with serving(tiny, **PAGED) as engine:
        expected = outputs(engine)
    scarce = dict(max_sequences=2, sequence_capacity=104, block_size=8)  # some requests are preempted
    for layout in (PAGED, scarce):
        with serving(tiny, **layout, cuda_graphs=True) as engine, counted(engine) as replayed:
            for _ in range(2):
                ids, logits = outputs(engine)
                assert ids == expected[0]
                for replayed_row, row in zip(logits, expected[1], strict=True):
                    torch.testing.assert_close(replayed_row, row, atol=ATOL, rtol=0)
        assert len(replayed) > 30
        assert len(set(replayed)) > 2
    assert set(recorder.batch_sizes) <= {1, 2, 4, 8}


def test_few_batch_sizes_are_recorded_and_each_once(tokenizer, recorder):
    with serving(Model(build("llama"), tokenizer), **PAGED, cuda_graphs=True) as engine:
        for count in (3, 1, 4, 2, 3, 4):
            with paused(engine):
                generations = [Generation(engine, random_tokens(random.Random(i), 9), 6) for i in range(count)]
            for each in generations:
                each.response.result()
    assert sorted(recorder.batch_sizes) == sorted(set(recorder.batch_sizes))
    assert [padded_batch_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 33, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]


def test_a_request_that_leaves_a_replayed_step_does_not_change_the_others(tokenizer, recorder):
    network = build("llama")
    reference = deepcopy(network)
    tokens = [7] * 60
    with serving(Model(network, tokenizer), **PAGED, cuda_graphs=True) as engine, counted(engine) as replayed:
        with paused(engine):
            generations = [
                Generation(engine, random_tokens(random.Random(seed), 20), 90, abort_after=5 * seed + 5)
                for seed in range(3)
            ]
            response = run_trees(
                engine, [3, 4, 5], *[TreeInput([token], accepted_path=range(i > 0)) for i, token in enumerate(tokens)]
            )
        for number, each in enumerate(generations):
            assert isinstance(each.response.wait().error, RequestCancelled)
            assert 5 * number + 5 <= len(each.token_ids) < 90
        logits = torch.cat(response.result())
        torch.testing.assert_close(logits, plain(reference, [3, 4, 5, *tokens])[3:], atol=ATOL, rtol=0)
        assert max(replayed) == 4 and min(replayed) == 1
        assert engine.stats.num_replayed_steps == len(replayed)


def test_logits_of_several_steps_outlive_the_steps_that_are_replayed_in_between(tokenizer, recorder):
    network = build("llama")
    reference = deepcopy(network)
    tokens = [7, 8, 9, 10, 11, 12]
    with (
        serving(Model(network, tokenizer), **PAGED, max_num_batched_tokens=1, cuda_graphs=True) as engine,
        counted(engine) as replayed,
    ):
        logits = torch.cat(
            run_trees(engine, [3, 4, 5], TreeInput(tokens[:3]), TreeInput(tokens[3:], accepted_path=range(3))).result()
        )
    torch.testing.assert_close(logits, plain(reference, [3, 4, 5, *tokens])[3:], atol=ATOL, rtol=0)
    assert replayed == [1] * 5


def test_padding_rows_write_only_to_the_spare_block(tokenizer, recorder):
    with serving(
        Model(build("llama"), tokenizer), max_sequences=2, sequence_capacity=16, block_size=8, cuda_graphs=True
    ) as engine:
        for _ in range(3):
            with paused(engine):
                generations = [Generation(engine, [seed], 6) for seed in range(3)]
            for each in generations:
                each.response.result()
        assert engine.stats.blocks_total == 4
        kv_cache = engine.model_runner.kv_cache
        assert 4 in recorder.batch_sizes
        in_use = [bool(kv_cache.keys[0][8 * block : 8 * block + 8].any()) for block in range(kv_cache.num_blocks)]
        assert in_use == [True, True, True, False, True]  # the spare block is the last
        assert not bool(kv_cache.keys[0][33:].any())  # only its first slot


def test_a_recording_with_different_logits_is_never_used(tokenizer, recorder, monkeypatch, caplog):
    inner = recorder.record

    def wrong(work):
        logits, play = inner(work)
        return logits, lambda: (play(), logits.mul_(-1))

    monkeypatch.setattr(recorder, "record", wrong)
    check_not_replayed(tokenizer, "llama", caplog, "logits differ")


def test_a_model_that_cannot_be_recorded_runs_ordinary_steps_and_warns_once(tokenizer, recorder, caplog):
    check_not_replayed(tokenizer, "deepseek_v3", caplog, "does not support")


def test_a_device_that_fails_to_record_tries_each_batch_size_once(tokenizer, recorder, monkeypatch, caplog):
    def failing(work):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recorder, "record", failing)
    check_not_replayed(tokenizer, "llama", caplog, "out of memory", times=2)


def check_not_replayed(tokenizer, kind, caplog, reason, times=1):
    tiny = Model(build(kind), tokenizer)
    with serving(tiny, **PAGED) as engine:
        expected = [generate(engine, count) for count in (1, 2)]
    with (
        caplog.at_level(logging.WARNING),
        serving(tiny, **PAGED, cuda_graphs=True) as engine,
        counted(engine) as replayed,
    ):
        assert [generate(engine, count) for count in (1, 2)] == expected
    assert not replayed
    assert len(caplog.records) == times
    assert reason in caplog.text


def generate(engine, count):
    with paused(engine):
        generations = [Generation(engine, random_tokens(random.Random(seed), 12), 10) for seed in range(count)]
    for each in generations:
        each.response.result()
    return [each.token_ids for each in generations]


@pytest.mark.parametrize("kind", SERVED)
def test_no_supported_model_reads_a_value_from_its_device_while_it_decodes(kind, tokenizer):
    """Otherwise it could not be recorded, and each step would wait for the device once more."""

    class ZeroAttention:
        def attend(self, layer, query, key, value, scale, window):
            return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])

    tiny = Model(build(kind), tokenizer)
    inputs = torch.tensor([[1, 2, 3], [5, 6, 2]])
    with torch.inference_mode(), ForbidHostSync():
        tiny.forward_tensors(inputs[:1], inputs[1:], ZeroAttention(), 0)


@pytest.mark.parametrize(
    "reads_value",
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
def test_operations_that_read_a_value_from_the_device_are_rejected(reads_value):
    for inference in (False, True):
        with torch.inference_mode(inference), pytest.raises(CannotReplayError), ForbidHostSync():
            reads_value(torch.zeros(4))


def test_what_stays_on_the_device_may_be_recorded():
    with torch.inference_mode(), ForbidHostSync():
        x = torch.arange(4.0)
        x[torch.tensor([1, 2])] = x[torch.tensor([3, 0])] * 2 + torch.tensor(1.0)
        x.copy_(x.to(torch.bfloat16).cumsum(0))
    assert x.tolist() == [0.0, 7.0, 8.0, 11.0]


class OneDevice(TorchDispatchMode):
    """Rejects tensors of several devices in one operation, as GPUs do, except for scalars and copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            assert len({tensor.device for tensor in tensors}) <= 1, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("kind", KERNEL_MODELS)
def test_no_operation_mixes_tensors_of_two_devices(kind, by_kernel, tokenizer, monkeypatch):
    """Checked on the meta device, which computes nothing."""
    meta = torch.device("meta")
    with meta:
        network = build(kind, max_position_embeddings=1024).bfloat16()
    monkeypatch.setattr(
        "parse.engines.native.model.optimize_network", lambda *_: None
    )  # it compares values, and a meta tensor has none
    monkeypatch.setattr(Model, "_self_check", lambda tiny: tiny._set_attention(STEP_ATTENTION))
    monkeypatch.setattr(paged_attention, "_has_kernel", lambda device: by_kernel)
    tiny, kv_cache = Model(network, tokenizer), KVCache(9, paged_attention.BLOCK_SIZE)
    sequences = [SequenceState(list(range(100))) for _ in range(4)]
    for number, sequence in enumerate(sequences):
        sequence.block_ids = [2 * number, 2 * number + 1]
    (a, b, c, d), forest = sequences, suffix_forest([10, 90], [1, 2, 3])
    chunks = [
        ScheduledChunk(a, [5], 100, 101),
        ScheduledChunk(b, [6], 100, 101),
        ScheduledChunk(c, (), 0, 60),
        ScheduledChunk(d, forest, 100, 106),
    ]
    tokens = [token for chunk in chunks for token in chunk.token_ids()]
    positions = [position for chunk in chunks for position in chunk.positions()]
    with torch.inference_mode(), OneDevice():
        logits, _ = tiny.forward(tokens, positions, PagedAttention(kv_cache, chunks), [0, 1, 64])
        assert (logits.device, logits.shape) == (meta, (3, VOCABULARY))
        table = torch.zeros(4, 6, dtype=torch.long, device=meta)
        step = DecodeAttention(kv_cache, table[:, 1], table[:, 2:])
        with ForbidHostSync(), suppress(*([] if by_kernel else [CannotReplayError])):
            assert tiny.forward_tensors(table[None, :, 0], table[None, :, 1], step, 0)[0].device == meta
    penalties = dict(frequency_penalty=0.4, repetition_penalty=1.2, logit_bias={3: 1.0})
    params = SamplingParams(top_p=0.9, top_k=5, min_p=0.1, **penalties)  # type: ignore[arg-type]
    states = [*Sampler(params, [1, 2], [3]).states([0, 4]), *Sampler(SamplingParams(), [1], []).states()]
    for read_results in (lambda: sample(logits, states), lambda: token_logprobs(logits, [1, 2, 3], 2)):
        with OneDevice(), pytest.raises(NotImplementedError, match="out of meta") as caught:
            read_results()
        assert any("tolist()" in str(entry.statement) for entry in caught.traceback)  # nothing is read before


def test_on_a_cpu_nothing_is_recorded(tokenizer):
    tiny = Model(build("llama"), tokenizer)
    assert cuda_graphs_for(tiny, KVCache(2, 16), 1, 16) is None
    with serving(tiny, cuda_graphs=True) as engine:
        assert engine.model_runner.cuda_graphs is None
        assert len(generate(engine, 2)[0]) == 10


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("kind", KERNEL_MODELS)
def test_on_a_gpu_replayed_steps_give_what_ordinary_ones_do(device, kind, tokenizer, caplog):
    network = build(kind, max_position_embeddings=1024, initializer_range=0.1)
    tiny = Model(network.bfloat16().to(device), tokenizer)
    prompts = [random_tokens(random.Random(seed), size) for seed, size in enumerate((700, 300, 20, 255, 256))]
    tokens = random_tokens(random.Random(9), 40)
    tree_inputs = [TreeInput([token], accepted_path=range(i > 0)) for i, token in enumerate(tokens)]
    config = dict(max_sequences=8, sequence_capacity=1024, max_num_batched_tokens=2048)
    outputs_by_run = []
    for cuda_graphs in (False, True):
        with caplog.at_level(logging.WARNING), serving(tiny, **config, cuda_graphs=cuda_graphs) as engine:
            for _ in range(2):
                with paused(engine):
                    responses = [
                        run_trees(engine, prompt, *tree_inputs[: 40 - 5 * i]) for i, prompt in enumerate(prompts)
                    ]
                outputs_by_run.append([torch.cat(response.result()) for response in responses])
            if graphs := engine.model_runner.cuda_graphs:
                assert sum(recording is not None for recording in graphs._recordings.values()) >= 3
    assert not caplog.records
    for outputs_of_run in outputs_by_run[1:]:
        for one, other in zip(outputs_of_run, outputs_by_run[0], strict=True):
            check_half_precision(one, other)


@pytest.mark.parametrize("device", [gpu])
def test_a_gpu_continues_after_a_recording_that_failed(device):
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


def nearly_greedy(network, prompt, token_ids):
    """Returns whether each token has nearly the highest logit, as the library computes it in single precision.

    Half precision decides between logits that are almost equal.
    """
    logits = plain(network, [*prompt, *token_ids])[len(prompt) - 1 : -1]
    gaps = logits.max(-1).values - logits[range(len(token_ids)), token_ids]
    return float(gaps.max()) < 0.2 * float(logits.abs().mean())


def test_only_a_token_with_nearly_the_highest_logit_counts_as_greedy():
    network, prompt = build("llama"), random_tokens(random.Random(0), 12)
    token_ids: list[int] = []
    for _ in range(10):
        token_ids.append(int(plain(network, [*prompt, *token_ids])[-1].argmax()))
    assert nearly_greedy(network, prompt, token_ids)
    for place in range(10):
        others = [*token_ids[:place], (token_ids[place] + 1) % VOCABULARY, *token_ids[place + 1 :]]
        assert not nearly_greedy(network, prompt, others)


@pytest.mark.parametrize("device", [gpu])
def test_on_a_gpu_engines_of_one_process_record_beside_one_another(device, tokenizer, caplog):
    """With and without graphs, each token is one that the library would choose."""
    networks = [build("llama", seed).bfloat16() for seed in range(2)]
    references = [deepcopy(network).float() for network in networks]
    models = [Model(network.to(device), tokenizer) for network in networks]
    ordinary: dict[int, list] = {}
    replayed: dict[int, list] = {}
    num_replayed_steps: dict[int, int] = {}

    def work(number, cuda_graphs, results):
        with serving(models[number], max_sequences=14, sequence_capacity=512, cuda_graphs=cuda_graphs) as engine:
            results[number] = [generate(engine, count) for count in (1, 3, 2, 5, 5)]
            num_replayed_steps[number] = engine.stats.num_replayed_steps

    with caplog.at_level(logging.WARNING):
        for cuda_graphs, results in ((False, ordinary), (True, replayed)):
            threads = [threading.Thread(target=work, args=(number, cuda_graphs, results)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not caplog.records
    assert all(num_replayed_steps[number] for number in range(2))
    for number, reference in enumerate(references):
        for results in (ordinary, replayed):
            for run, count in zip(results[number], (1, 3, 2, 5, 5), strict=True):
                assert len(run) == count
                for seed, token_ids in enumerate(run):
                    assert len(token_ids) == 10 and max(token_ids) < VOCABULARY
                    prompt = random_tokens(random.Random(seed), 12)  # the same as in `generate`
                    assert nearly_greedy(reference, prompt, token_ids)
