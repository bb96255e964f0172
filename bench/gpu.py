"""Measures the engine on a GPU against the limits of the hardware, with random weights in the shapes of real models.

    python -m bench.gpu --shape qwen3-8b
    python -m bench.gpu --shape qwen3-32b --batches 1,8,32 --profile --json 32b.json

The limit of decoding is the bytes that a step must read, and the limit of prompts is their multiplications, at the
rates that a plain copy and a plain matrix product reach on the same device immediately before. Both are also compared
with `generate()`. Verification is counted in decode steps. Everything is measured with and without CUDA graphs.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from bench.engine_speed import drain, generate_s, prefill_s, random_prompts
from bench.output import add_json_argument, write_output
from bench.roofline import SHAPES, build_model, copy_bytes_per_s, matmul_flops_per_s, roofline_costs, synchronize
from parse.config import EngineSettings
from parse.engines.native.engine import MAX_SUFFIX_TOKENS, NativeEngine
from parse.engines.native.model import Model
from parse.prompts import VerificationSuffix
from parse.requests import VerifyRequest
from parse.types import SamplingParams
from training.evaluate import MODELS
from training.provenance import describe_run

DRAFT_TOKENS, SUFFIX_TOKENS, PREFIX_COUNTS = 512, 16, (16, 32)  # tokens, tokens, prefixes
ANSWER_TOKENS = 64  # tokens
NUM_DECODING = 8  # requests that decode while a draft is verified
NUM_PREFILLS = 4  # prompts at the same time
ROUNDS = 3  # the result is their median


@dataclass(frozen=True)
class BenchmarkPlan:
    prompt_tokens: int
    batch_sizes: Sequence[int]
    max_num_batched_tokens: int


def measure_generate(network: PreTrainedModel, plan: BenchmarkPlan) -> dict[str, Any]:
    """Measures `generate()`, in milliseconds, with the attention that the library chooses."""
    device = network.device
    decode: dict[str, float] = {}
    for batch in tqdm(plan.batch_sizes, desc="generate()", file=sys.stderr):
        input_ids = torch.tensor(random_prompts(batch, plan.prompt_tokens, seed=batch), device=device)
        generate_s(network, input_ids, 4)
        answer_s, first_token_s = (
            statistics.median(generate_s(network, input_ids, n) for _ in range(ROUNDS)) for n in (ANSWER_TOKENS, 1)
        )
        decode[str(batch)] = (answer_s - first_token_s) / (ANSWER_TOKENS - 1) * 1e3
    new_prompts = torch.tensor(random_prompts(NUM_PREFILLS, plan.prompt_tokens, seed=7), device=device)
    prefill_s = statistics.median(generate_s(network, new_prompts, 1) for _ in range(ROUNDS))
    prompt, draft, suffix = verification_inputs(plan)

    @torch.inference_mode()
    def verify_one_by_one_s(lengths: Sequence[int]) -> float:
        started = time.perf_counter()
        for length in lengths:
            input_ids = torch.tensor([[*prompt, *draft[:length], *suffix]], device=device)
            network(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        synchronize(device)
        return time.perf_counter() - started

    verify_one_by_one_s(prefix_lengths(2))
    return {
        "decode_ms": decode,
        "prompt_tokens_per_s": new_prompts.numel() / prefill_s,
        "judge_ms": {str(n): verify_one_by_one_s(prefix_lengths(n)) * 1e3 for n in PREFIX_COUNTS},
    }


def verification_inputs(plan: BenchmarkPlan) -> tuple[list[int], list[int], list[int]]:
    prompt, draft, suffix = (
        random_prompts(1, n, seed)[0]
        for seed, n in enumerate((plan.prompt_tokens, DRAFT_TOKENS, SUFFIX_TOKENS), start=1)
    )
    return prompt, draft, suffix


def prefix_lengths(count: int) -> list[int]:
    return [DRAFT_TOKENS * (k + 1) // count for k in range(count)]


@contextmanager
def start_engine(model: Model, plan: BenchmarkPlan, graphs: bool) -> Iterator[NativeEngine]:
    max_model_len = plan.prompt_tokens + max(DRAFT_TOKENS, ANSWER_TOKENS) + 16
    extra_tokens = 512  # tokens: for the answer, and for blocks that are partly filled
    cache_tokens = (max(plan.batch_sizes) + NUM_DECODING + NUM_PREFILLS) * (plan.prompt_tokens + extra_tokens) + 2 * (
        max_model_len + MAX_SUFFIX_TOKENS
    )
    settings = EngineSettings(
        model=model.name,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=cache_tokens * model.bytes_per_token,
        max_num_seqs=max(*plan.batch_sizes, NUM_DECODING + 1),
        max_num_batched_tokens=plan.max_num_batched_tokens,
        cuda_graphs=graphs,
    )
    engine = NativeEngine(settings, model)
    try:
        yield engine
    finally:
        engine.shutdown()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_engine(model: Model, plan: BenchmarkPlan, graphs: bool) -> dict[str, Any]:
    with start_engine(model, plan, graphs) as engine:
        decode, sampled = {}, {}
        for batch in tqdm(plan.batch_sizes, desc="engine", file=sys.stderr):
            decode[str(batch)] = median_ms(partial(decode_s, engine, plan, batch, temperature=0.0))
            sampled[str(batch)] = median_ms(partial(decode_s, engine, plan, batch, temperature=0.8, top_p=0.95))
        seeds = iter(range(100, 1 << 30))
        prefill_ms = median_ms(
            lambda: prefill_s(engine, random_prompts(NUM_PREFILLS, plan.prompt_tokens, seed=next(seeds)))
        )
        verify_ms = {
            str(num_prefixes): median_ms(partial(verify_s, engine, plan, num_prefixes))
            for num_prefixes in PREFIX_COUNTS
        }
        verify_while_decoding_ms = median_ms(partial(verify_while_decoding_s, engine, plan, PREFIX_COUNTS[0]))
        load = engine.stats
    return {
        "decode_ms": {batch: ms / ANSWER_TOKENS for batch, ms in decode.items()},
        "sampled_ms": {batch: ms / ANSWER_TOKENS for batch, ms in sampled.items()},
        "prompt_tokens_per_s": NUM_PREFILLS * plan.prompt_tokens / prefill_ms * 1e3,
        "judge_ms": verify_ms,
        "judge_beside_writers_ms": verify_while_decoding_ms,
        "replayed_share": load.num_replayed_steps / load.num_steps,
    }


def median_ms(work: Callable[[], Any]) -> float:
    """Returns the median of the seconds that `work` reports, in milliseconds, without the first run."""
    asyncio.run(work())
    return statistics.median(asyncio.run(work()) for _ in range(ROUNDS)) * 1e3


async def decode_s(engine: NativeEngine, plan: BenchmarkPlan, batch: int, **sampling_fields: Any) -> float:
    prompts = random_prompts(batch, plan.prompt_tokens, seed=batch)
    for prompt in prompts:
        await engine.prefill(prompt)
    sampling_params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True, **sampling_fields)
    started = time.perf_counter()
    await asyncio.gather(*(drain(engine, prompt, sampling_params) for prompt in prompts))
    return time.perf_counter() - started


async def verify_s(engine: NativeEngine, plan: BenchmarkPlan, num_prefixes: int) -> float:
    prompt, draft, suffix = verification_inputs(plan)
    await engine.prefill([*prompt, *draft])
    started = time.perf_counter()
    await engine.verify(
        VerifyRequest(
            prompt_token_ids=prompt,
            draft_token_ids=draft,
            prefix_lengths=prefix_lengths(num_prefixes),
            suffix=VerificationSuffix(tuple(suffix), (1,), (2,)),
            policy=None,
        )
    )
    return time.perf_counter() - started


async def verify_while_decoding_s(engine: NativeEngine, plan: BenchmarkPlan, num_prefixes: int) -> float:
    sampling_params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    prompts = random_prompts(NUM_DECODING, plan.prompt_tokens, seed=3)
    for prompt in prompts:
        await engine.prefill(prompt)
    decoding = [asyncio.create_task(drain(engine, prompt, sampling_params)) for prompt in prompts]
    await asyncio.sleep(0.02)
    seconds = await verify_s(engine, plan, num_prefixes)
    await asyncio.gather(*decoding)
    return seconds


def profile_decode(model: Model, plan: BenchmarkPlan, graphs: bool, batch: int) -> dict[str, Any]:
    """Returns the share of the time in which the device computes while it decodes, and the longest kernels."""
    with start_engine(model, plan, graphs) as engine:
        asyncio.run(decode_s(engine, plan, batch, temperature=0.0))
        activity = ProfilerActivity.CUDA if model.device.type == "cuda" else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            seconds = asyncio.run(decode_s(engine, plan, batch, temperature=0.0))
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    busy = sum(kernel.self_device_time_total for kernel in kernels) * 1e-6
    return {
        "busy": busy / seconds,
        "kernels_a_step": sum(kernel.count for kernel in kernels) / ANSWER_TOKENS,
        "longest_ms_a_step": {k.key[:60]: k.self_device_time_total * 1e-3 / ANSWER_TOKENS for k in kernels[:8]},
    }


def run(name: str, plan: BenchmarkPlan, device: torch.device, profile: bool) -> dict[str, Any]:
    shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    copied, multiplied = copy_bytes_per_s(device), matmul_flops_per_s(device, dtype)
    network = build_model(shape, device, dtype)
    generate = measure_generate(network, plan)
    model = Model(network, AutoTokenizer.from_pretrained(MODELS / "demo-target"), name)
    roofline = roofline_costs(shape, dtype.itemsize)
    graph_modes = {"ordinary": False, "recorded": True}
    return {
        "shape": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "context": plan.prompt_tokens,
        "copied_tb_per_s": copied * 1e-12,
        "multiplied_tflops": multiplied * 1e-12,
        "bound": {
            "decode_ms": {
                str(batch): (roofline.step_bytes + batch * plan.prompt_tokens * roofline.token_bytes) / copied * 1e3
                for batch in plan.batch_sizes
            },
            "prompt_tokens_per_s": multiplied / roofline.token_flops,
        },
        "generate": generate,
        **{name_: measure_engine(model, plan, graphs) for name_, graphs in graph_modes.items()},
        "profile": {
            name_: {
                str(batch): profile_decode(model, plan, graphs, batch)
                for batch in (plan.batch_sizes[0], plan.batch_sizes[-1])
            }
            for name_, graphs in graph_modes.items()
            if profile
        },
    }


def table(result: Mapping[str, Any]) -> str:
    bound, generate, ordinary, recorded = (
        result[measured] for measured in ("bound", "generate", "ordinary", "recorded")
    )
    lines = [
        f"{result['shape']} with random weights, context {result['context']}; {result['device']}; "
        f"{result['versions']}; "
        f"copies at {result['copied_tb_per_s']:.2f} TB/s, multiplies at {result['multiplied_tflops']:.0f} TFLOP/s",
        "",
        "| batch | ms a step, recorded | ordinary | generate() | bound | of the bound | sampled |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch, bound_ms in bound["decode_ms"].items():
        cells = [*(mode["decode_ms"][batch] for mode in (recorded, ordinary, generate)), bound_ms]
        share = bound_ms / recorded["decode_ms"][batch]
        sampled = recorded["sampled_ms"][batch]
        lines.append(f"| {batch} | {' | '.join(f'{ms:.2f}' for ms in cells)} | {share:.0%} | {sampled:.2f} |")
    lines.append("")
    share = recorded["replayed_share"]
    lines.append(f"Recorded: {share:.0%} of all steps were replayed, prompts and verification among them.")
    speed, max_speed = ordinary["prompt_tokens_per_s"], bound["prompt_tokens_per_s"]
    lines.append(
        f"Prompts: {speed:.0f} tokens/s, {speed / max_speed:.0%} of the limit; generate() "
        f"{generate['prompt_tokens_per_s']:.0f}"
    )
    step = next(iter(recorded["decode_ms"].values()))
    for num_prefixes, ms in recorded["judge_ms"].items():
        naive = generate["judge_ms"][num_prefixes]
        lines.append(
            f"{num_prefixes} cached prefixes: {ms:.1f} ms, {ms / step:.1f} decode steps; one by one {naive:.0f} ms, "
            f"{naive / ms:.0f} times"
        )
    verify_ms = recorded["judge_beside_writers_ms"]
    lines.append(f"{PREFIX_COUNTS[0]} prefixes while {NUM_DECODING} requests decode: {verify_ms:.1f} ms")
    for key, batches in result["profile"].items():
        for batch, profile in batches.items():
            kernel_times = ", ".join(f"{name} {ms:.3f}" for name, ms in profile["longest_ms_a_step"].items())
            lines.append(
                f"{key}, batch {batch}: the device computes {profile['busy']:.0%} of the time, "
                f"{profile['kernels_a_step']:.0f} kernels a step; ms a step: {kernel_times}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--batches", default="1,8,32,64", help="requests that decode at the same time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--step-tokens", type=int, default=2048, help="maximum tokens computed in one pass")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="profile the device while it decodes")
    add_json_argument(parser)
    args = parser.parse_args()
    description = describe_run()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here; `--device cpu --shape tiny` tries the program")
    batches = sorted({int(batch) for batch in args.batches.split(",")})
    if not batches or batches[0] < 1 or args.context < 1:
        parser.error("--batches, --context: at least 1")
    result = run(
        args.shape, BenchmarkPlan(args.context, batches, args.step_tokens), torch.device(args.device), args.profile
    )
    write_output({"run": description, **result}, table(result), args.json)


if __name__ == "__main__":
    main()
