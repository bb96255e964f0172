"""Measures the engine alone: decoding, prompts and verification, against the `transformers` library."""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, PreTrainedModel

from bench.output import heading, row
from parse.config import EngineSettings
from parse.demo import DEMO_TARGET
from parse.engines.native.attention import StepAttention
from parse.engines.native.engine import NativeEngine
from parse.engines.native.model import Model
from parse.engines.native_loader import load_native_engine
from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, VerifyRequest
from parse.tree import suffix_forest
from parse.types import SamplingParams
from training.confidence import Interval, format_ratio, rounds_interval

LAYERS, HIDDEN_SIZE, VOCAB_SIZE = 12, 256, 8192
PROMPT_TOKENS, DRAFT_TOKENS, ANSWER_TOKENS = 256, 256, 128  # tokens
NUM_PREFIXES, SUFFIX_TOKENS = 16, 16
BATCHES = (1, 4, 8, 16)
HOST_BATCHES = (1, 8, 32)
ROUNDS = 5  # contenders take turns; the result is the median of the rounds
GREEDY = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)


def run(num_threads: int, rounds: int = ROUNDS) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory() as folder:
        network = random_model()
        network.save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEMO_TARGET).save_pretrained(folder)
        engine = load_native_engine(
            EngineSettings(
                model=folder, num_threads=num_threads, max_model_len=1024, kv_cache_memory_bytes=1024 * 2**20
            )
        )
        hf_model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    try:
        # The system assigns memory when it is first used. That time is not part of the measurement.
        asyncio.run(prefill_s(engine, random_prompts(2 * max(BATCHES), PROMPT_TOKENS, seed=0)))
        return {
            "model": f"Llama, {LAYERS} layers x {HIDDEN_SIZE}, random weights, float32",
            "threads": num_threads,
            "rounds": rounds,
            "decode": {str(batch): measure_decode(engine, hf_model, batch, rounds) for batch in BATCHES},
            "prompts": {str(batch): measure_prefill(engine, hf_model, batch, rounds) for batch in BATCHES},
            "verification": measure_verification(engine, hf_model, rounds),
            "host_ms": measure_host_overhead(rounds),
            "memory": measure_memory(),
        }
    finally:
        engine.shutdown()


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def measure_decode(engine: NativeEngine, hf_model: PreTrainedModel, batch: int, rounds: int) -> dict[str, Any]:
    """Measures tokens per second of decoding, without the time of the prompts."""
    prompts = random_prompts(batch, PROMPT_TOKENS, seed=batch)

    def engine_speed() -> float:
        seconds = asyncio.run(_decode_s(engine, prompts))
        return batch * (ANSWER_TOKENS - 1) / seconds

    def generate_speed() -> float:
        input_ids = torch.tensor(prompts)
        return (
            batch
            * (ANSWER_TOKENS - 1)
            / (generate_s(hf_model, input_ids, ANSWER_TOKENS) - generate_s(hf_model, input_ids, 1))
        )

    return _compare_speeds(engine_speed, generate_speed, rounds)


def measure_prefill(engine: NativeEngine, hf_model: PreTrainedModel, batch: int, rounds: int) -> dict[str, Any]:
    """Measures prompt tokens per second."""
    seeds = iter(range(1, 1 << 30))

    def engine_speed() -> float:
        prompts = random_prompts(batch, PROMPT_TOKENS, seed=1000 * batch + next(seeds))
        return batch * PROMPT_TOKENS / asyncio.run(prefill_s(engine, prompts))

    def generate_speed() -> float:
        return (
            batch * PROMPT_TOKENS / generate_s(hf_model, torch.tensor(random_prompts(batch, PROMPT_TOKENS, seed=7)), 1)
        )

    return _compare_speeds(engine_speed, generate_speed, rounds)


def measure_verification(engine: NativeEngine, hf_model: PreTrainedModel, rounds: int) -> dict[str, Any]:
    """Measures the milliseconds to verify 16 prefixes.

    *packed* is the engine with a cached draft, *naive* one sequence for each prefix, and *dense mask* one sequence with
    all suffixes, both computed by the library without a cache.
    """
    prompt, draft, suffix = (
        random_prompts(1, size, seed)[0] for size, seed in ((PROMPT_TOKENS, 1), (DRAFT_TOKENS, 2), (SUFFIX_TOKENS, 3))
    )
    prefix_lengths = [DRAFT_TOKENS * (k + 1) // NUM_PREFIXES for k in range(NUM_PREFIXES)]
    request = VerifyRequest(
        prompt_token_ids=prompt,
        draft_token_ids=draft,
        prefix_lengths=prefix_lengths,
        suffix=VerificationSuffix(tuple(suffix), (1,), (2,)),
        policy=None,
    )

    async def packed() -> float:
        await engine.prefill([*prompt, *draft])
        started = time.perf_counter()
        await engine.verify(request)
        return time.perf_counter() - started

    @torch.inference_mode()
    def naive() -> float:
        started = time.perf_counter()
        for length in prefix_lengths:
            hf_model(input_ids=torch.tensor([[*prompt, *draft[:length], *suffix]]), use_cache=False, logits_to_keep=1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def dense() -> float:
        """Verifies as a user of the library would: one sequence with all suffixes, and a dense mask."""
        started = time.perf_counter()
        num_computed_tokens = PROMPT_TOKENS + DRAFT_TOKENS
        tree = suffix_forest([PROMPT_TOKENS + length for length in prefix_lengths], suffix)
        size = num_computed_tokens + len(tree)
        visible = torch.ones(size, size, dtype=torch.bool).tril()
        visible[num_computed_tokens:, :num_computed_tokens] = (
            torch.arange(num_computed_tokens) < torch.from_numpy(tree.visible_context(num_computed_tokens))[:, None]
        )
        visible[num_computed_tokens:, num_computed_tokens:] = torch.from_numpy(tree.visible())
        mask = torch.zeros(size, size).masked_fill_(~visible, torch.finfo(torch.float32).min)
        positions = torch.cat(
            [
                torch.arange(num_computed_tokens),
                torch.from_numpy(tree.visible_context(num_computed_tokens) + tree.depth),
            ]
        )
        tokens = torch.tensor([[*prompt, *draft, *tree.tokens.tolist()]])
        hf_model(input_ids=tokens, position_ids=positions[None], attention_mask=mask[None, None], use_cache=False)
        return time.perf_counter() - started

    @torch.inference_mode()
    def step() -> float:
        cache = DynamicCache(config=hf_model.config)
        hf_model(input_ids=torch.tensor([[*prompt, *draft]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        started = time.perf_counter()
        hf_model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        return time.perf_counter() - started

    measurements: dict[str, Callable[[], float]] = {
        "packed_ms": lambda: asyncio.run(packed()),
        "naive_ms": naive,
        "dense_mask_ms": dense,
        "decode_step_ms": step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            seconds[name].append(measure())
    result = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    return {
        **result,
        "cheaper_than_naive": result["naive_ms"] / result["packed_ms"],
        "cheaper_than_naive_interval": _rounds_ratio_interval(seconds["naive_ms"], seconds["packed_ms"]),
        "in_decode_steps": result["packed_ms"] / result["decode_step_ms"],
        "in_decode_steps_interval": _rounds_ratio_interval(seconds["packed_ms"], seconds["decode_step_ms"]),
    }


def measure_host_overhead(rounds: int) -> dict[str, dict[str, float]]:
    """Measures the milliseconds of a decode step with a model that computes nothing: the overhead on the host."""
    model, logits = small_model(), torch.randn(max(HOST_BATCHES), 512, generator=torch.Generator().manual_seed(0))

    def idle_forward(
        tokens: Sequence[int], positions: Sequence[int], step: StepAttention, logits_entries: Sequence[int] | None
    ) -> tuple[Tensor, None]:
        return logits[: len(tokens if logits_entries is None else logits_entries)], None

    model.forward = idle_forward  # type: ignore[method-assign]
    engine = NativeEngine(EngineSettings(model="idle", kv_cache_memory_bytes=64 * 2**20, max_model_len=256), model)
    greedy = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    params_by_name = {"greedy": greedy, "sampled": replace(greedy, temperature=0.8, top_p=0.95)}

    async def steps(batch: int, sampling_params: SamplingParams) -> float:
        prompts = [[10 + number] * 64 for number in range(batch)]
        for prompt in prompts:
            await engine.prefill(prompt)
        before, started = engine.stats.num_steps, time.perf_counter()
        await asyncio.gather(*(drain(engine, prompt, sampling_params) for prompt in prompts))
        return (time.perf_counter() - started) / (engine.stats.num_steps - before) * 1e3

    try:
        return {
            name: {
                str(b): statistics.median(asyncio.run(steps(b, params)) for _ in range(rounds)) for b in HOST_BATCHES
            }
            for name, params in params_by_name.items()
        }
    finally:
        engine.shutdown()


def small_model() -> Model:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    return Model(network, AutoTokenizer.from_pretrained(DEMO_TARGET))


def measure_memory() -> dict[str, float]:
    """Measures resident memory after the first thousand short requests, and after ten thousand."""
    engine = NativeEngine(
        EngineSettings(model="random", kv_cache_memory_bytes=64 * 2**20, max_model_len=256), small_model()
    )

    async def requests(first: int, count: int) -> None:
        slots = asyncio.Semaphore(32)

        async def run_one(seed: int) -> None:
            async with slots:
                draw = random.Random(seed)
                prompt = [draw.randrange(512) for _ in range(draw.randint(4, 40))]
                await drain(engine, prompt, SamplingParams(seed=seed, max_tokens=4, ignore_eos=True))

        await asyncio.gather(*(run_one(seed) for seed in range(first, first + count)))

    try:
        asyncio.run(requests(0, 1000))
        before = resident_mb()
        for thousand in range(1, 10):
            asyncio.run(requests(1000 * thousand, 1000))
        return {"after_1000_mb": before, "after_10000_mb": resident_mb()}
    finally:
        engine.shutdown()


def resident_mb() -> float:
    _, resident, *_ = Path("/proc/self/statm").read_text().split()  # in units of the system's page size
    return int(resident) * os.sysconf("SC_PAGE_SIZE") / 2**20


def random_prompts(count: int, length: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(10, vocab_size, (count, length), generator=generator).tolist()
    return prompts


async def _decode_s(engine: NativeEngine, prompts: list[list[int]]) -> float:
    """Returns the seconds of decoding, without the first token of each request."""
    for prompt in prompts:
        await engine.prefill(prompt)
    started = time.perf_counter()
    await asyncio.gather(*(drain(engine, prompt, GREEDY) for prompt in prompts))
    return (time.perf_counter() - started) * (ANSWER_TOKENS - 1) / ANSWER_TOKENS


async def prefill_s(engine: NativeEngine, prompts: list[list[int]]) -> float:
    started = time.perf_counter()
    one_token = SamplingParams(temperature=0.0, max_tokens=1)
    await asyncio.gather(*(drain(engine, prompt, one_token) for prompt in prompts))
    return time.perf_counter() - started


async def drain(engine: NativeEngine, prompt: list[int], sampling_params: SamplingParams) -> None:
    async for _ in engine.generate(GenerateRequest(prompt_token_ids=prompt, sampling_params=sampling_params)):
        pass


@torch.inference_mode()
def generate_s(hf_model: PreTrainedModel, input_ids: torch.Tensor, tokens: int) -> float:
    started = time.perf_counter()
    hf_model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    if input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _compare_speeds(
    engine_speed: Callable[[], float], generate_speed: Callable[[], float], rounds: int
) -> dict[str, Any]:
    engine_speed(), generate_speed()
    pairs = [(engine_speed(), generate_speed()) for _ in range(rounds)]
    engine_speeds, generate_speeds = zip(*pairs, strict=True)
    engine_median, generate_median = statistics.median(engine_speeds), statistics.median(generate_speeds)
    return {
        "tokens_per_s": engine_median,
        "generate_tokens_per_s": generate_median,
        "ratio": statistics.geometric_mean(engine / generate for engine, generate in pairs),
        "ratio_interval": _rounds_ratio_interval(engine_speeds, generate_speeds),
    }


def _rounds_ratio_interval(values: Sequence[float], base_values: Sequence[float]) -> Interval | None:
    return rounds_interval([value / base for value, base in zip(values, base_values, strict=True)])


def table(result: Mapping[str, Any]) -> str:
    names = "decode tok/s", "generate()", "ratio", "prompt tok/s", "generate()", "ratio"
    lines = [f"Model: {result['model']}.", "", *heading("batch", *names)]
    for batch, decode in result["decode"].items():
        cells = [
            cell
            for speeds in (decode, result["prompts"][batch])
            for cell in (
                f"{speeds['tokens_per_s']:.0f}",
                f"{speeds['generate_tokens_per_s']:.0f}",
                format_ratio(speeds["ratio"], speeds["ratio_interval"]),
            )
        ]
        lines.append(row(batch, *cells))
    v, m = result["verification"], result["memory"]
    columns = "engine", "in decode steps", "one by one", "ratio", "with a dense mask"
    lines += ["", *heading("verification", *columns)]
    lines.append(
        row(
            f"{NUM_PREFIXES} prefixes",
            f"{v['packed_ms']:.0f} ms",
            format_ratio(v["in_decode_steps"], v["in_decode_steps_interval"]),
            f"{v['naive_ms']:.0f} ms",
            format_ratio(v["cheaper_than_naive"], v["cheaper_than_naive_interval"]),
            f"{v['dense_mask_ms']:.0f} ms",
        )
    )
    batches = (f"{batch} request{'s' if batch > 1 else ''}" for batch in HOST_BATCHES)
    lines += ["", *heading("step without a model", *batches)]
    for name, times in result["host_ms"].items():
        lines.append(row(name, *(f"{ms:.2f} ms" for ms in times.values())))
    lines += [
        "",
        f"Resident memory: {m['after_1000_mb']:.0f} MB after 1,000 short requests, {m['after_10000_mb']:.0f} MB after "
        "10,000.",
    ]
    return "\n".join(lines)
