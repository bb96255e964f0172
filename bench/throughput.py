"""The engine by itself: decoding, prompts and verification, against the library's own ways of doing them."""

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

from parse.config import EngineSettings
from parse.engines.native.attention import StepAttention
from parse.engines.native.model import Model
from parse.engines.native.service import NativeEngine
from parse.prompts import VerificationSuffix
from parse.tree import suffix_forest
from parse.types import SamplingParams
from training.evaluate import MODELS

LAYERS, WIDTH, VOCABULARY = 12, 256, 8192
PROMPT, DRAFT, ANSWER = 256, 256, 128  # tokens
CUTS, SUFFIX = 16, 16
BATCHES = (1, 4, 8, 16)
HOST_BATCHES = (1, 8, 32)
ROUNDS = 5  # everything is measured that often, in turns; the medians count
GREEDY = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)


def run(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        network = random_model()
        network.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODELS / "demo-target").save_pretrained(folder)
        service = NativeEngine(EngineSettings(model=folder, threads=threads, max_context=1024, memory_mb=1024))
        peer: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    try:
        # The system hands memory out when it is first touched, which is not what is measured here.
        asyncio.run(read(service, texts(2 * max(BATCHES), PROMPT, seed=0)))
        return {
            "model": f"Llama, {LAYERS} layers x {WIDTH}, random weights, float32",
            "threads": threads,
            "decode": {str(batch): decoding(service, peer, batch) for batch in BATCHES},
            "prompts": {str(batch): reading(service, peer, batch) for batch in BATCHES},
            "verification": verification(service, peer),
            "host_ms": host(),
            "memory": memory(),
        }
    finally:
        service.shutdown()


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def decoding(service: NativeEngine, peer: PreTrainedModel, batch: int) -> dict[str, float]:
    """Tokens per second after prompts that are cached, the prompts' own time taken off."""
    prompts = texts(batch, PROMPT, seed=batch)

    def ours() -> float:
        started = asyncio.run(_warmed(service, prompts))
        return batch * (ANSWER - 1) / started

    def theirs() -> float:
        rows = torch.tensor(prompts)
        return batch * (ANSWER - 1) / (generate_s(peer, rows, ANSWER) - generate_s(peer, rows, 1))

    return _side_by_side(ours, theirs)


def reading(service: NativeEngine, peer: PreTrainedModel, batch: int) -> dict[str, float]:
    """Prompt tokens per second."""
    fresh = iter(range(1, 1 << 30))

    def ours() -> float:
        prompts = texts(batch, PROMPT, seed=1000 * batch + next(fresh))
        return batch * PROMPT / asyncio.run(read(service, prompts))

    def theirs() -> float:
        return batch * PROMPT / generate_s(peer, torch.tensor(texts(batch, PROMPT, seed=7)), 1)

    return _side_by_side(ours, theirs)


def verification(service: NativeEngine, peer: PreTrainedModel) -> dict[str, float]:
    """Milliseconds to judge 16 cached prefixes: packed, as separate texts, and under a dense mask from scratch."""
    prompt, draft, suffix = (texts(1, size, seed)[0] for size, seed in ((PROMPT, 1), (DRAFT, 2), (SUFFIX, 3)))
    cuts = [DRAFT * (k + 1) // CUTS for k in range(CUTS)]
    check = VerificationSuffix(tuple(suffix), (1,), (2,))

    async def packed() -> float:
        await service.warm([*prompt, *draft])
        started = time.perf_counter()
        await service.judge(prompt, draft, cuts, check)
        return time.perf_counter() - started

    @torch.inference_mode()
    def naive() -> float:
        started = time.perf_counter()
        for cut in cuts:
            peer(input_ids=torch.tensor([[*prompt, *draft[:cut], *suffix]]), use_cache=False, logits_to_keep=1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def dense() -> float:
        """As a library user would: one text, the copies behind it, and a mask."""
        started = time.perf_counter()
        known = PROMPT + DRAFT
        tree = suffix_forest([PROMPT + cut for cut in cuts], suffix)
        size = known + len(tree)
        visible = torch.ones(size, size, dtype=torch.bool).tril()
        visible[known:, :known] = torch.arange(known) < torch.from_numpy(tree.visible_context(known))[:, None]
        visible[known:, known:] = torch.from_numpy(tree.visible())
        mask = torch.zeros(size, size).masked_fill_(~visible, torch.finfo(torch.float32).min)
        positions = torch.cat([torch.arange(known), torch.from_numpy(tree.visible_context(known) + tree.depth)])
        tokens = torch.tensor([[*prompt, *draft, *tree.tokens.tolist()]])
        peer(input_ids=tokens, position_ids=positions[None], attention_mask=mask[None, None], use_cache=False)
        return time.perf_counter() - started

    @torch.inference_mode()
    def step() -> float:
        cache = DynamicCache(config=peer.config)
        peer(input_ids=torch.tensor([[*prompt, *draft]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        started = time.perf_counter()
        peer(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        return time.perf_counter() - started

    ways: dict[str, Callable[[], float]] = {
        "packed_ms": lambda: asyncio.run(packed()),
        "naive_ms": naive,
        "dense_mask_ms": dense,
        "decode_step_ms": step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(way())
    result = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    return {
        **result,
        "cheaper_than_naive": result["naive_ms"] / result["packed_ms"],
        "in_decode_steps": result["packed_ms"] / result["decode_step_ms"],
    }


def host() -> dict[str, dict[str, float]]:
    """Milliseconds of a decode step that are no model's: what it costs on whatever device."""
    model, logits = small(), torch.randn(max(HOST_BATCHES), 512, generator=torch.Generator().manual_seed(0))

    def idle(
        tokens: Sequence[int], positions: Sequence[int], step: StepAttention, logits_entries: Sequence[int] | None
    ) -> tuple[Tensor, None]:
        return logits[: len(tokens if logits_entries is None else logits_entries)], None

    model.forward = idle  # type: ignore[method-assign]
    service = NativeEngine(EngineSettings(model="idle", memory_mb=64, max_context=256), model)
    ways = {"greedy": SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)}
    ways["sampled"] = replace(ways["greedy"], temperature=0.8, top_p=0.95)

    async def steps(batch: int, sampling: SamplingParams) -> float:
        prompts = [[10 + number] * 64 for number in range(batch)]
        for prompt in prompts:
            await service.warm(prompt)
        before, started = service.stats.num_steps, time.perf_counter()
        await asyncio.gather(*(drain(service, prompt, sampling) for prompt in prompts))
        return (time.perf_counter() - started) / (service.stats.num_steps - before) * 1e3

    try:
        return {
            way: {str(b): statistics.median(asyncio.run(steps(b, how)) for _ in range(ROUNDS)) for b in HOST_BATCHES}
            for way, how in ways.items()
        }
    finally:
        service.shutdown()


def small() -> Model:
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
    return Model(network, AutoTokenizer.from_pretrained(MODELS / "demo-target"))


def memory() -> dict[str, float]:
    """Resident memory after the first thousand short requests, and after ten thousand."""
    service = NativeEngine(EngineSettings(model="random", memory_mb=64, max_context=256), small())

    async def requests(first: int, count: int) -> None:
        places = asyncio.Semaphore(32)

        async def one(seed: int) -> None:
            async with places:
                draw = random.Random(seed)
                prompt = [draw.randrange(512) for _ in range(draw.randint(4, 40))]
                await drain(service, prompt, SamplingParams(seed=seed, max_tokens=4, ignore_eos=True))

        await asyncio.gather(*(one(seed) for seed in range(first, first + count)))

    try:
        asyncio.run(requests(0, 1000))
        before = resident_mb()
        for thousand in range(1, 10):
            asyncio.run(requests(1000 * thousand, 1000))
        return {"after_1000_mb": before, "after_10000_mb": resident_mb()}
    finally:
        service.shutdown()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def texts(count: int, length: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = torch.randint(10, VOCABULARY, (count, length), generator=draw).tolist()
    return rows


async def _warmed(service: NativeEngine, prompts: list[list[int]]) -> float:
    """Seconds from the moment all have their first token to the end of the last."""
    for prompt in prompts:
        await service.warm(prompt)
    started = time.perf_counter()
    await asyncio.gather(*(drain(service, prompt, GREEDY) for prompt in prompts))
    return (time.perf_counter() - started) * (ANSWER - 1) / ANSWER


async def read(service: NativeEngine, prompts: list[list[int]]) -> float:
    started = time.perf_counter()
    once = SamplingParams(temperature=0.0, max_tokens=1)
    await asyncio.gather(*(drain(service, prompt, once) for prompt in prompts))
    return time.perf_counter() - started


async def drain(service: NativeEngine, prompt: list[int], sampling: SamplingParams) -> None:
    async for _ in service.generate(prompt, sampling=sampling):
        pass


@torch.inference_mode()
def generate_s(peer: PreTrainedModel, rows: torch.Tensor, tokens: int) -> float:
    started = time.perf_counter()
    peer.generate(  # type: ignore[operator]
        rows, attention_mask=torch.ones_like(rows), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
    )
    if rows.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _side_by_side(ours: Callable[[], float], theirs: Callable[[], float]) -> dict[str, float]:
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(ROUNDS)]
    speed, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"tokens_per_s": speed, "generate_tokens_per_s": peer, "ratio": speed / peer}


def table(result: Mapping[str, Any]) -> str:
    lines = [result["model"], "", "| batch | decode tok/s | generate() | ratio | prompt tok/s | generate() | ratio |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for batch, decode in result["decode"].items():
        cells = [
            f"{way['tokens_per_s']:.0f} | {way['generate_tokens_per_s']:.0f} | {way['ratio']:.2f}"
            for way in (decode, result["prompts"][batch])
        ]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    v = result["verification"]
    lines.append("")
    lines.append(
        f"{CUTS} cached prefixes: {v['packed_ms']:.0f} ms, {v['in_decode_steps']:.1f} decode steps; one by one "
        f"{v['naive_ms']:.0f} ms, {v['cheaper_than_naive']:.0f} times; under a dense mask {v['dense_mask_ms']:.0f} ms"
    )
    for way, steps in result["host_ms"].items():
        told = ", ".join(f"{ms:.2f} ms for {batch}" for batch, ms in steps.items())
        lines.append(f"A {way} step around a model that computes nothing: {told}")
    m = result["memory"]
    lines.append(
        f"10,000 short requests: {m['after_1000_mb']:.0f} MB after 1,000, {m['after_10000_mb']:.0f} MB at the end"
    )
    return "\n".join(lines)
