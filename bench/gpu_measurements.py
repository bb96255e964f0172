"""Measurements of an engine and of `generate()`, for models with random weights on any device."""

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from bench.engine_speed import drain, prefill_s, random_prompts
from bench.gpu_plan import BenchmarkPlan
from bench.roofline import synchronize
from parse.acceptance import AcceptancePolicy, Thresholds
from parse.config import EngineSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native.model import Model
from parse.prefixes import DEFAULT_STRIDE, prefix_lengths_every
from parse.prompts import VerificationSuffix
from parse.requests import VerifyAndGenerateRequest, VerifyRequest
from parse.types import SamplingParams, TokenDelta, VerifyResult

Seconds = Coroutine[Any, Any, float]

# All prefixes pass, and the complete draft fails, so that every prefix is evaluated. With `ACCEPT_DRAFT`, the draft
# passes, and the first pass decides.
REJECT_DRAFT, ACCEPT_DRAFT = Thresholds(full=1.0, prefix=0.0), Thresholds(full=0.0, prefix=0.0)
DECODE_SEED, DECODING_SEED, VERIFICATION_SEED, PREFILL_SEED, FUSED_SEED = 0, 1000, 2000, 3000, 4000


@contextmanager
def start_engine(model: Model, plan: BenchmarkPlan, cuda_graphs: bool) -> Iterator[NativeEngine]:
    cache_tokens = plan.kv_cache_tokens(contiguous=model.device.type == "cpu")
    settings = EngineSettings(
        model=model.name,
        max_model_len=plan.max_model_len,
        kv_cache_memory_bytes=cache_tokens * model.bytes_per_token,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        cuda_graphs=cuda_graphs,
    )
    engine = NativeEngine(settings, model)
    try:
        yield engine
    finally:
        engine.shutdown()


def free_memory(device: torch.device) -> None:
    """Returns the memory of deleted tensors to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_gib(device: torch.device) -> float | None:
    """Returns the memory that tensors have taken at most since the last call, or None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


async def prefill(engine: NativeEngine, prompts: Sequence[Sequence[int]]) -> None:
    """Computes prompts, and waits for the device, so that no measurement contains a part of this work."""
    for prompt in prompts:
        await engine.prefill(prompt)
    synchronize(engine.model.device)


def median_ms(plan: BenchmarkPlan, work: Callable[[], Seconds]) -> float:
    """Returns the median of the seconds that `work` returns, in milliseconds, without the first run."""
    asyncio.run(work())
    return statistics.median(asyncio.run(work()) for _ in range(plan.rounds)) * 1e3


def measure_decode(engine: NativeEngine, plan: BenchmarkPlan, batch: int, **sampling_fields: Any) -> dict[str, float]:
    """Returns the milliseconds of a decode step, and the share of the steps that replayed a CUDA graph."""
    prompts = random_prompts(batch, plan.prompt_tokens, seed=DECODE_SEED + batch)
    sampling_params = SamplingParams(max_tokens=plan.decode_tokens, ignore_eos=True, **sampling_fields)
    replayed_shares = []

    async def decode_s() -> float:
        await prefill(engine, prompts)
        before, started = engine.stats, time.perf_counter()
        await asyncio.gather(*(drain(engine, prompt, sampling_params) for prompt in prompts))
        seconds, after = time.perf_counter() - started, engine.stats
        num_replayed_steps = after.num_replayed_steps - before.num_replayed_steps
        replayed_shares.append(num_replayed_steps / (after.num_steps - before.num_steps))
        return seconds

    ms = median_ms(plan, decode_s) / plan.decode_tokens
    return {"ms": ms, "replayed_share": replayed_shares[-1]}


def measure_prompts(engine: NativeEngine, plan: BenchmarkPlan) -> float:
    """Returns the prompt tokens per second."""
    seeds = iter(range(PREFILL_SEED, FUSED_SEED))
    ms = median_ms(
        plan, lambda: prefill_s(engine, random_prompts(plan.num_prefills, plan.prompt_tokens, seed=next(seeds)))
    )
    return plan.num_prefills * plan.prompt_tokens / ms * 1e3


def verify_request(plan: BenchmarkPlan, draft_tokens: int, stride: int, seed: int = VERIFICATION_SEED) -> VerifyRequest:
    """Returns the verification of a complete draft of random tokens that is rejected."""
    prompt, draft, suffix = (
        random_prompts(1, length, seed + number)[0]
        for number, length in enumerate((plan.prompt_tokens, draft_tokens, plan.suffix_tokens))
    )
    return VerifyRequest(
        prompt_token_ids=prompt,
        draft_token_ids=draft,
        draft_complete=True,
        prefix_lengths=prefix_lengths_every(stride, draft_tokens, complete=True),
        suffix=VerificationSuffix(tuple(suffix), (1,), (2,)),
        policy=AcceptancePolicy(REJECT_DRAFT),
    )


def engine_stride(engine: NativeEngine) -> int:
    """Returns the distance between the prefixes that the pipeline would verify with this engine."""
    return engine.capabilities().stride or DEFAULT_STRIDE


async def verify_s(engine: NativeEngine, request: VerifyRequest) -> float:
    started = time.perf_counter()
    await engine.verify(request)
    return time.perf_counter() - started


def measure_verification(engine: NativeEngine, plan: BenchmarkPlan, draft_tokens: int) -> dict[str, float]:
    """Measures the verification of a cached draft.

    Either all prefixes are evaluated, or the draft is accepted at once.
    """
    request = verify_request(plan, draft_tokens, engine_stride(engine))
    accepted = replace(request, policy=AcceptancePolicy(ACCEPT_DRAFT))
    asyncio.run(prefill(engine, [[*request.prompt_token_ids, *request.draft_token_ids]]))
    all_prefixes_ms = median_ms(plan, lambda: verify_s(engine, request))
    accepted_ms = median_ms(plan, lambda: verify_s(engine, accepted))
    steps_before = engine.stats.num_steps
    asyncio.run(verify_s(engine, request))
    return {
        "prefixes": len(request.prefix_lengths),
        "passes": engine.stats.num_steps - steps_before,
        "all_prefixes_ms": all_prefixes_ms,
        "accepted_ms": accepted_ms,
    }


def measure_verification_while_decoding(engine: NativeEngine, plan: BenchmarkPlan) -> float:
    """Returns the milliseconds of a verification while other requests decode."""
    request = verify_request(plan, min(plan.draft_lengths), engine_stride(engine))
    sampling_params = SamplingParams(temperature=0.0, max_tokens=plan.decode_tokens, ignore_eos=True)
    prompts = random_prompts(plan.num_decoding, plan.prompt_tokens, seed=DECODING_SEED)

    async def work() -> float:
        await prefill(engine, [[*request.prompt_token_ids, *request.draft_token_ids], *prompts])
        decoding = [asyncio.create_task(drain(engine, prompt, sampling_params)) for prompt in prompts]
        await asyncio.sleep(0.02)
        seconds = await verify_s(engine, request)
        await asyncio.gather(*decoding)
        return seconds

    return median_ms(plan, work)


async def _token_seconds(engine: NativeEngine, request: VerifyAndGenerateRequest, one_call: bool) -> list[float]:
    """Returns the seconds until each token after the accepted prefix."""
    await prefill(engine, [request.verify.prompt_token_ids])
    seconds: list[float] = []
    started = time.perf_counter()

    def record(delta: VerifyResult | TokenDelta) -> None:
        if isinstance(delta, TokenDelta):
            seconds.extend([time.perf_counter() - started] * len(delta.token_ids))

    if one_call:
        async with aclosing(engine.verify_and_generate(request)) as items:
            async for item in items:
                record(item)
    else:
        result = await engine.verify(request.verify)
        continuation = request.continuation(request.accepted_prefix_length(result))
        assert continuation is not None
        async with aclosing(engine.generate(continuation)) as deltas:
            async for delta in deltas:
                record(delta)
    return seconds


def measure_fused_call(engine: NativeEngine, plan: BenchmarkPlan) -> dict[str, float]:
    """Compares a call to `verify_and_generate` with a call to `verify` and then one to `generate`.

    Only the prompt is cached, as in the service. All prefixes of the draft pass, and the draft itself fails. Each call
    has a prompt and a draft of its own, and both kinds of calls take turns.
    """
    draft_tokens, stride, rng = min(plan.draft_lengths), engine_stride(engine), random.Random(0)
    first_token_s: dict[str, list[float]] = {"two_calls": [], "one_call": []}
    last_token_s: dict[str, list[float]] = {"two_calls": [], "one_call": []}
    num_accepted = 0
    for number in range(plan.rounds + 1):
        for name in rng.sample(list(last_token_s), len(last_token_s)):
            seed = FUSED_SEED + 10 * (2 * number + (name == "one_call"))
            verify = verify_request(plan, draft_tokens, stride, seed)
            num_accepted = verify.prefix_lengths[-2] if len(verify.prefix_lengths) > 1 else 0
            sampling_params = SamplingParams(
                temperature=0.0, max_tokens=num_accepted + plan.continuation_tokens, ignore_eos=True
            )
            request = VerifyAndGenerateRequest(verify=verify, sampling_params=sampling_params)
            seconds = asyncio.run(_token_seconds(engine, request, name == "one_call"))
            if len(seconds) != plan.continuation_tokens:
                raise RuntimeError(f"{name}: {len(seconds)} tokens follow {num_accepted} accepted ones")
            first_token_s[name].append(seconds[0])
            last_token_s[name].append(seconds[-1])
    result: dict[str, float] = {"accepted_tokens": num_accepted, "generated_tokens": plan.continuation_tokens}
    for name in last_token_s:
        result[f"{name}_first_token_ms"] = statistics.median(first_token_s[name][1:]) * 1e3
        result[f"{name}_ms"] = statistics.median(last_token_s[name][1:]) * 1e3
    return result


def profile_decode(engine: NativeEngine, plan: BenchmarkPlan, batch: int) -> dict[str, Any]:
    """Returns the share of the time in which the device computes while it decodes, and the longest kernels."""
    prompts = random_prompts(batch, plan.prompt_tokens, seed=DECODE_SEED + batch)
    sampling_params = SamplingParams(temperature=0.0, max_tokens=plan.profiled_tokens, ignore_eos=True)

    async def decode_s() -> float:
        await prefill(engine, prompts)
        started = time.perf_counter()
        await asyncio.gather(*(drain(engine, prompt, sampling_params) for prompt in prompts))
        return time.perf_counter() - started

    asyncio.run(decode_s())
    activity = ProfilerActivity.CUDA if engine.model.device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        seconds = asyncio.run(decode_s())
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    return {
        "busy_share": sum(kernel.self_device_time_total for kernel in kernels) * 1e-6 / seconds,
        "kernels_per_step": sum(kernel.count for kernel in kernels) / plan.profiled_tokens,
        "longest_ms_per_step": {
            kernel.key[:60]: kernel.self_device_time_total * 1e-3 / plan.profiled_tokens for kernel in kernels[:8]
        },
    }


# `generate()`


class _TokenTimes(StoppingCriteria):
    """Records when each token is computed, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def restore_library_functions(network: PreTrainedModel) -> None:
    """Undoes what the engine has changed in a network, so that `generate()` runs as the library wrote it."""
    network.set_attn_implementation("sdpa")
    for module in network.modules():
        vars(module).pop("forward", None)


@torch.inference_mode()
def measure_generate(network: PreTrainedModel, plan: BenchmarkPlan, batch: int) -> dict[str, float]:
    """Returns the milliseconds of a step of `generate()`, and its prompt tokens per second."""
    input_ids = torch.tensor(random_prompts(batch, plan.prompt_tokens, DECODE_SEED + batch), device=network.device)
    result: dict[str, float] = {}
    for _ in range(2):  # the first run does not count
        token_times = _TokenTimes()
        started = time.perf_counter()
        network.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=plan.decode_tokens,
            max_new_tokens=plan.decode_tokens,
            stopping_criteria=StoppingCriteriaList([token_times]),
        )
        first, *_, last = token_times.times
        result = {
            "ms": (last - first) / (plan.decode_tokens - 1) * 1e3,
            "prompt_tokens_per_s": input_ids.numel() / (first - started),
        }
    return result


@torch.inference_mode()
def measure_one_by_one(network: PreTrainedModel, plan: BenchmarkPlan, prefix_lengths: Sequence[int]) -> float:
    """Returns the milliseconds to verify each prefix of the shortest draft as a sequence of its own."""
    request = verify_request(plan, min(plan.draft_lengths), DEFAULT_STRIDE)

    def logits_of(length: int) -> None:
        tokens = [*request.prompt_token_ids, *request.draft_token_ids[:length], *request.suffix.token_ids]
        network(input_ids=torch.tensor([tokens], device=network.device), use_cache=False, logits_to_keep=1)

    logits_of(prefix_lengths[-1])
    synchronize(network.device)
    started = time.perf_counter()
    for length in prefix_lengths:
        logits_of(length)
    synchronize(network.device)
    return (time.perf_counter() - started) * 1e3
