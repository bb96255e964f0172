"""The engine on a GPU against what the hardware allows: random weights in the shapes of real models, in bfloat16.

    python -m bench.gpu --shape qwen3-8b
    python -m bench.gpu --shape qwen3-32b --batches 1,8,32 --profile --json 32b.json

Decoding is held against the bytes that a step must read, prompts against the multiplications they take, at the rates
that a plain copy and a plain product of matrices reach on the same device just before; both against `generate()`.
Verification is counted in decode steps. Every way is measured without recorded steps and with them.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.throughput import drain, generate_s, read, texts
from parse.config import EngineSettings
from parse.engines.native.model import Model
from parse.engines.native.service import MAX_SUFFIX_TOKENS, NativeEngine
from parse.prompts import VerificationSuffix
from parse.types import SamplingParams
from training.evaluate import MODELS

DRAFT, SUFFIX, CUTS = 512, 16, (16, 32)  # tokens, tokens, probes
ANSWER = 64  # tokens
WRITERS = 8  # beside whom a draft is judged
READERS = 4  # prompts at the same time
ROUNDS = 3  # the medians count


@dataclass(frozen=True)
class Shape:
    kind: str
    width: int
    inside: int  # of the feed-forward layers
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    head: int = 128
    tied: bool = False


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True),
    "qwen3-1.7b": Shape("qwen3", 2048, 6144, 28, 16, 8, 151936, tied=True),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 151936),
    "qwen3-32b": Shape("qwen3", 5120, 25600, 64, 64, 8, 151936),
    "llama-3.1-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "tiny": Shape("llama", 64, 128, 2, 4, 2, 8192, head=16),  # to try this program
}


@dataclass(frozen=True)
class Costs:
    """What no program can do without, from the shapes alone."""

    step_bytes: int  # of weights that every step reads
    token_bytes: int  # of keys and values, for each token of context
    token_flops: int  # for each token of a prompt, attention not counted


def costs(shape: Shape, size: int) -> Costs:
    """`size` bytes a number."""
    attention = shape.width * shape.head * (2 * shape.heads + 2 * shape.key_heads)
    layers = shape.layers * (attention + 3 * shape.width * shape.inside)
    return Costs(
        step_bytes=size * (layers + shape.width * shape.vocabulary),
        token_bytes=size * 2 * shape.layers * shape.key_heads * shape.head,
        token_flops=2 * layers,  # logits are computed for the last one only
    )


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inside,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return network.eval()


def copied_per_s(device: torch.device) -> float:
    """Bytes, read and written."""
    source = torch.empty(2**32 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def multiplied_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations in a product of random matrices."""
    size = 8192 if device.type == "cuda" else 512
    one, other = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / seconds(lambda: one @ other, device)


def seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    for _ in range(3):
        work()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Plan:
    context: int
    batches: Sequence[int]
    step_tokens: int


def of_the_library(network: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """Milliseconds, before the engine has touched the model; its attention is the library's own choice."""
    device = network.device
    decode: dict[str, float] = {}
    for batch in tqdm(plan.batches, desc="generate()", file=sys.stderr):
        rows = torch.tensor(texts(batch, plan.context, seed=batch), device=device)
        generate_s(network, rows, 4)
        many, one = (statistics.median(generate_s(network, rows, n) for _ in range(ROUNDS)) for n in (ANSWER, 1))
        decode[str(batch)] = (many - one) / (ANSWER - 1) * 1e3
    fresh = torch.tensor(texts(READERS, plan.context, seed=7), device=device)
    reading = statistics.median(generate_s(network, fresh, 1) for _ in range(ROUNDS))
    prompt, draft, suffix = asked(plan)

    @torch.inference_mode()
    def judged(cuts: Sequence[int]) -> float:
        started = time.perf_counter()
        for cut in cuts:
            row = torch.tensor([[*prompt, *draft[:cut], *suffix]], device=device)
            network(input_ids=row, use_cache=False, logits_to_keep=1)
        wait(device)
        return time.perf_counter() - started

    judged(places(2))
    return {
        "decode_ms": decode,
        "prompt_tokens_per_s": fresh.numel() / reading,
        "judge_ms": {str(n): judged(places(n)) * 1e3 for n in CUTS},
    }


def asked(plan: Plan) -> tuple[list[int], list[int], list[int]]:
    prompt, draft, suffix = (texts(1, n, seed)[0] for seed, n in enumerate((plan.context, DRAFT, SUFFIX), start=1))
    return prompt, draft, suffix


def places(cuts: int) -> list[int]:
    return [DRAFT * (k + 1) // cuts for k in range(cuts)]


@contextmanager
def serving(model: Model, plan: Plan, graphs: bool) -> Iterator[NativeEngine]:
    longest = plan.context + max(DRAFT, ANSWER) + 16
    pages = 512  # tokens: what is written, and pages that are not quite full
    room = (max(plan.batches) + WRITERS + READERS) * (plan.context + pages) + 2 * (longest + MAX_SUFFIX_TOKENS)
    settings = EngineSettings(
        model=model.name,
        max_context=longest,
        memory_mb=room * model.bytes_per_token // 2**20 + 1,
        max_running=max(*plan.batches, WRITERS + 1),
        step_tokens=plan.step_tokens,
    )
    service = NativeEngine(settings, model, cuda_graphs=graphs)
    try:
        yield service
    finally:
        service.shutdown()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def of_the_engine(model: Model, plan: Plan, graphs: bool) -> dict[str, Any]:
    with serving(model, plan, graphs) as service:
        decode, sampled = {}, {}
        for batch in tqdm(plan.batches, desc="engine", file=sys.stderr):
            decode[str(batch)] = median_ms(partial(written, service, plan, batch, temperature=0.0))
            sampled[str(batch)] = median_ms(partial(written, service, plan, batch, temperature=0.8, top_p=0.95))
        fresh = iter(range(100, 1 << 30))
        reading = median_ms(lambda: read(service, texts(READERS, plan.context, seed=next(fresh))))
        judge = {str(cuts): median_ms(partial(judged, service, plan, cuts)) for cuts in CUTS}
        beside = median_ms(partial(judged_beside_writers, service, plan, CUTS[0]))
        load = service.stats
    return {
        "decode_ms": {batch: ms / ANSWER for batch, ms in decode.items()},
        "sampled_ms": {batch: ms / ANSWER for batch, ms in sampled.items()},
        "prompt_tokens_per_s": READERS * plan.context / reading * 1e3,
        "judge_ms": judge,
        "judge_beside_writers_ms": beside,
        "replayed_share": load.num_replayed_steps / load.num_steps,
    }


def median_ms(work: Callable[[], Any]) -> float:
    """Of what takes that many seconds by its own account; the first time does not count."""
    asyncio.run(work())
    return statistics.median(asyncio.run(work()) for _ in range(ROUNDS)) * 1e3


async def written(service: NativeEngine, plan: Plan, batch: int, **sampling: Any) -> float:
    prompts = texts(batch, plan.context, seed=batch)
    for prompt in prompts:
        await service.warm(prompt)
    how = SamplingParams(max_tokens=ANSWER, ignore_eos=True, **sampling)
    started = time.perf_counter()
    await asyncio.gather(*(drain(service, prompt, how) for prompt in prompts))
    return time.perf_counter() - started


async def judged(service: NativeEngine, plan: Plan, cuts: int) -> float:
    prompt, draft, suffix = asked(plan)
    await service.warm([*prompt, *draft])
    started = time.perf_counter()
    await service.judge(prompt, draft, places(cuts), VerificationSuffix(tuple(suffix), (1,), (2,)))
    return time.perf_counter() - started


async def judged_beside_writers(service: NativeEngine, plan: Plan, cuts: int) -> float:
    how = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    prompts = texts(WRITERS, plan.context, seed=3)
    for prompt in prompts:
        await service.warm(prompt)
    writers = [asyncio.create_task(drain(service, prompt, how)) for prompt in prompts]
    await asyncio.sleep(0.02)
    taken = await judged(service, plan, cuts)
    await asyncio.gather(*writers)
    return taken


def profiled(model: Model, plan: Plan, graphs: bool, batch: int) -> dict[str, Any]:
    """How much of the time the device computes while it decodes, and what."""
    with serving(model, plan, graphs) as service:
        asyncio.run(written(service, plan, batch, temperature=0.0))
        on = ProfilerActivity.CUDA if model.device.type == "cuda" else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[on]) as profile:
            taken = asyncio.run(written(service, plan, batch, temperature=0.0))
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    busy = sum(kernel.self_device_time_total for kernel in kernels) * 1e-6
    return {
        "busy": busy / taken,
        "kernels_a_step": sum(kernel.count for kernel in kernels) / ANSWER,
        "longest_ms_a_step": {k.key[:60]: k.self_device_time_total * 1e-3 / ANSWER for k in kernels[:8]},
    }


def run(name: str, plan: Plan, device: torch.device, profile: bool) -> dict[str, Any]:
    shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    copied, multiplied = copied_per_s(device), multiplied_per_s(device, dtype)
    network = build(shape, device, dtype)
    library = of_the_library(network, plan)
    model = Model(network, AutoTokenizer.from_pretrained(MODELS / "demo-target"), name)
    least = costs(shape, dtype.itemsize)
    ways = {"ordinary": False, "recorded": True}
    return {
        "shape": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "context": plan.context,
        "copied_tb_per_s": copied * 1e-12,
        "multiplied_tflops": multiplied * 1e-12,
        "bound": {
            "decode_ms": {
                str(batch): (least.step_bytes + batch * plan.context * least.token_bytes) / copied * 1e3
                for batch in plan.batches
            },
            "prompt_tokens_per_s": multiplied / least.token_flops,
        },
        "generate": library,
        **{way: of_the_engine(model, plan, graphs) for way, graphs in ways.items()},
        "profile": {
            way: {str(batch): profiled(model, plan, graphs, batch) for batch in (plan.batches[0], plan.batches[-1])}
            for way, graphs in ways.items()
            if profile
        },
    }


def table(result: Mapping[str, Any]) -> str:
    bound, library, ordinary, recorded = (result[way] for way in ("bound", "generate", "ordinary", "recorded"))
    lines = [
        f"{result['shape']} in random weights, context {result['context']}; {result['device']}, {result['versions']}; "
        f"copies at {result['copied_tb_per_s']:.2f} TB/s, multiplies at {result['multiplied_tflops']:.0f} TFLOP/s",
        "",
        "| batch | ms a step, recorded | ordinary | generate() | bound | of the bound | sampled |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch, least in bound["decode_ms"].items():
        cells = [*(way["decode_ms"][batch] for way in (recorded, ordinary, library)), least]
        share = least / recorded["decode_ms"][batch]
        sampled = recorded["sampled_ms"][batch]
        lines.append(f"| {batch} | {' | '.join(f'{ms:.2f}' for ms in cells)} | {share:.0%} | {sampled:.2f} |")
    lines.append("")
    share = recorded["replayed_share"]
    lines.append(f"Recorded: {share:.0%} of all steps were replayed, prompts and judging among them.")
    reading, most = ordinary["prompt_tokens_per_s"], bound["prompt_tokens_per_s"]
    lines.append(
        f"Prompts: {reading:.0f} tokens/s, {reading / most:.0%} of what multiplying allows; generate() "
        f"{library['prompt_tokens_per_s']:.0f}"
    )
    step = next(iter(recorded["decode_ms"].values()))
    for cuts, ms in recorded["judge_ms"].items():
        naive = library["judge_ms"][cuts]
        lines.append(
            f"{cuts} cached prefixes: {ms:.1f} ms, {ms / step:.1f} decode steps; one by one {naive:.0f} ms, "
            f"{naive / ms:.0f} times"
        )
    lines.append(f"{CUTS[0]} beside {WRITERS} who write: {recorded['judge_beside_writers_ms']:.1f} ms")
    for way, batches in result["profile"].items():
        for batch, seen in batches.items():
            longest = ", ".join(f"{name} {ms:.3f}" for name, ms in seen["longest_ms_a_step"].items())
            lines.append(
                f"{way}, batch {batch}: the device computes {seen['busy']:.0%} of the time, "
                f"{seen['kernels_a_step']:.0f} kernels a step; ms a step: {longest}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--batches", default="1,8,32,64", help="requests that decode at the same time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--step-tokens", type=int, default=2048, help="most tokens computed in one pass")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="say what the device does while it decodes")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here; `--device cpu --shape tiny` tries the program")
    batches = sorted({int(batch) for batch in args.batches.split(",")})
    if not batches or batches[0] < 1 or args.context < 1:
        parser.error("--batches, --context: at least 1")
    result = run(args.shape, Plan(args.context, batches, args.step_tokens), torch.device(args.device), args.profile)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
