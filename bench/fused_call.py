"""Measures what `verify_and_generate` saves over a call to `verify` and then one to `generate`, on a Ray Serve replica.

    python -m bench.fused_call --problems 100 --json fused_call.json

The verifier runs in a replica of its own, with the target of serve_config.yaml, as in the service. For each draft, both
ways to answer take turns. Every prompt starts with tokens of its own, so that no call finds the work of another one in
the prefix cache. It is prefilled before the time starts, because the service does that while it drafts.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from bench.output import add_json_argument, heading, row, write_output
from deployments.launch import read_config
from deployments.serving.busy_time import BusyTime
from deployments.serving.circuit_breaker import CircuitBreaker
from deployments.serving.replica_clients import VerifierClient
from deployments.serving.verifier import Verifier
from deployments.session import Session
from parse.acceptance import AcceptancePolicy
from parse.config import EngineSettings, VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.engines.native_loader import load_native_engine
from parse.prefixes import DEFAULT_STRIDE, prefix_lengths_every
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import NO_STREAMING, SamplingParams, TokenDelta, VerifyResult
from training import measure
from training.confidence import median_interval
from training.provenance import PROJECT_ROOT, describe_run

PARAMS = SamplingParams(temperature=0.0, max_tokens=240)
METHODS = {"default": None, "none": "none"}
WARMUP = 4
FIRST_TOKEN_IDS = range(20, 400)  # of ordinary words
CONTINUED, COMPLETE = "continued", "complete"


async def draft_requests(seed: int, num_problems: int) -> list[VerifyAndGenerateRequest]:
    """Returns a request to verify the complete draft of each problem, as mode full makes it."""
    settings = VerificationSettings.for_model(DEMO_TARGET)
    engine = load_native_engine(EngineSettings(model=DEMO_DRAFT, num_threads=1))
    tokenizer = engine.model.tokenizer
    suffix = build_verification_suffix(tokenizer, settings.prompt, settings.correct, settings.incorrect)
    requests = []
    for problem in measure.draw_problems(seed, num_problems, split="bench"):
        prompt = chat_prompt_token_ids(tokenizer, [{"role": "user", "content": problem.question}])
        call = GenerateRequest(prompt_token_ids=prompt, sampling_params=PARAMS, stream_interval=NO_STREAMING)
        (delta,) = [delta async for delta in engine.generate(call)]
        complete = delta.finish_reason == "stop"
        verify = VerifyRequest(
            prompt_token_ids=tuple(prompt),
            draft_token_ids=delta.token_ids,
            draft_complete=complete,
            prefix_lengths=tuple(
                prefix_lengths_every(settings.stride or DEFAULT_STRIDE, len(delta.token_ids), complete=complete)
            ),
            suffix=suffix,
            policy=AcceptancePolicy(settings.thresholds(), settings.rule, exhaustive=settings.exhaustive),
        )
        requests.append(VerifyAndGenerateRequest(verify=verify, sampling_params=PARAMS))
    engine.shutdown()
    return requests


async def answer_with_two_calls(client: VerifierClient, request: VerifyAndGenerateRequest) -> list[int]:
    """Returns the tokens after the accepted prefix."""
    result = await client.verify(request.verify)
    rest = request.continuation(request.accepted_prefix_length(result))
    if rest is None:
        return []
    async with aclosing(client.generate(rest)) as deltas:
        return [token async for delta in deltas for token in delta.token_ids]


async def answer_with_one_call(client: VerifierClient, request: VerifyAndGenerateRequest) -> list[int]:
    """Returns the tokens after the accepted prefix."""
    async with aclosing(client.verify_and_generate(request)) as items:
        result = await anext(items)
        assert isinstance(result, VerifyResult)
        if request.continuation(request.accepted_prefix_length(result)) is None:
            return []
        return [token async for delta in items if isinstance(delta, TokenDelta) for token in delta.token_ids]


Answer = Callable[[VerifierClient, VerifyAndGenerateRequest], Awaitable[list[int]]]
ANSWERS: Mapping[str, Answer] = {"two_calls": answer_with_two_calls, "one_call": answer_with_one_call}


async def compare(
    handle: DeploymentHandle, requests: Sequence[VerifyAndGenerateRequest], method: str | None
) -> dict[str, Any]:
    """Returns the milliseconds of both ways, for drafts that were continued and for those that were complete."""
    circuit_breaker = CircuitBreaker("verifier", handle, BusyTime())
    rng = random.Random(0)
    times: dict[str, list[dict[str, float]]] = {CONTINUED: [], COMPLETE: []}
    for number, request in enumerate([*requests[:WARMUP], *requests]):
        prefix = (rng.choice(FIRST_TOKEN_IDS), rng.choice(FIRST_TOKEN_IDS))
        milliseconds: dict[str, float] = {}
        output: list[int] = []
        for name in rng.sample(list(ANSWERS), len(ANSWERS)):
            prompt = (*prefix, rng.choice(FIRST_TOKEN_IDS), *request.verify.prompt_token_ids)
            own_request = replace(
                request, verify=replace(request.verify, prompt_token_ids=prompt), speculative_method=method
            )
            client = VerifierClient(handle, Session("benchmark"), circuit_breaker)
            await client.prefill(prompt)
            started = time.perf_counter()
            output = await ANSWERS[name](client, own_request)
            milliseconds[name] = (time.perf_counter() - started) * 1e3
        if number >= WARMUP:
            times[CONTINUED if output else COMPLETE].append(milliseconds)
    return {kind: _figures(pairs) for kind, pairs in times.items() if pairs}


def _figures(pairs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    saved = [pair["two_calls"] - pair["one_call"] for pair in pairs]
    return {
        "drafts": len(pairs),
        **{f"{name}_ms": statistics.median(pair[name] for pair in pairs) for name in ANSWERS},
        "saved_ms": statistics.median(saved),
        "saved_ms_interval": median_interval(saved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fused_call", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100, help="number of problems (default: 100)")
    parser.add_argument("--seed", type=int, default=5, help="seed of the problems (default: 5)")
    add_json_argument(parser)
    args = parser.parse_args()
    description = describe_run(problems=args.problems, seeds=[args.seed])
    _, settings = read_config(PROJECT_ROOT / "serve_config.yaml")
    requests = asyncio.run(draft_requests(args.seed, args.problems))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        deployment = serve.deployment(name="Verifier", ray_actor_options={"num_cpus": 1})(Verifier)
        handle = serve.run(deployment.bind(settings.target), name="fused-call", route_prefix=None)
        result = {"run": description} | {
            name: asyncio.run(compare(handle, requests, method)) for name, method in METHODS.items()
        }
    finally:
        serve.shutdown()
        ray.shutdown()
    write_output(result, table(result), args.json)


def table(result: Mapping[str, Any]) -> str:
    names = "method", "drafts", "two calls", "one call", "saved per answer, median (95% interval)"
    lines = heading(*names)
    for method in METHODS:
        for kind, figures in result[method].items():
            low, high = figures["saved_ms_interval"] or (float("nan"), float("nan"))
            lines.append(
                row(
                    method,
                    f"{figures['drafts']} {kind}",
                    f"{figures['two_calls_ms']:.1f} ms",
                    f"{figures['one_call_ms']:.1f} ms",
                    f"{figures['saved_ms']:.1f} ms ({low:.1f} to {high:.1f})",
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
