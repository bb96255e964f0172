"""Measures what it gains to draft the next request while one is verified, with two processes of one thread each.

    python -m bench.overlap --problems 60 --json overlap.json

One by one, a request takes d for its draft and t for the work of the target. With several requests in flight the slower
of the two limits the throughput, so the gain is at most (d + t) / max(d, t) unless requests are also batched. The
program measures one request at a time on each side, and then batches.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.contenders import GREEDY
from bench.output import add_json_argument, heading, row, write_output
from parse.config import EngineSettings, VerificationSettings
from parse.engines.native_loader import load_native_engine
from parse.events import Finished, Usage
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import DraftRequest, GenerateRequest, GenerationRequest
from parse.types import NO_STREAMING, TokenDelta
from training import measure
from training.confidence import format_ratio, rounds_interval
from training.evaluate import MODELS
from training.provenance import describe_run


def serve_drafts(settings: EngineSettings, pipe: Connection) -> None:
    """Runs the process of the drafter. It returns complete drafts and runs as many at once as its engine allows."""
    torch.set_num_threads(1)

    async def serve() -> None:
        engine = load_native_engine(settings)
        pipe.send("ready")
        loop = asyncio.get_running_loop()
        running: set[asyncio.Task[None]] = set()

        async def draft(number: int, request: GenerateRequest) -> None:
            ids: list[int] = []
            async for delta in engine.generate(request):
                ids += delta.token_ids
                finish = delta.finish_reason
            pipe.send((number, TokenDelta(tuple(ids), finish_reason=finish)))

        while (call := await loop.run_in_executor(None, pipe.recv)) is not None:
            task = asyncio.create_task(draft(*call))
            running.add(task)
            task.add_done_callback(running.discard)
        engine.shutdown()

    asyncio.run(serve())


class PipeDrafter:
    """A drafter whose engine runs in another process."""

    def __init__(self, settings: EngineSettings) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = spawn.Pipe()
        self._process = spawn.Process(target=serve_drafts, args=(settings, child_pipe), daemon=True)
        self._process.start()
        assert self._pipe.recv() == "ready"
        self._pending: dict[int, asyncio.Future[TokenDelta]] = {}
        self._listener = ThreadPoolExecutor(1)
        self._count = 0

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        while (message := await loop.run_in_executor(self._listener, self._receive)) is not None:
            number, draft = message
            self._pending.pop(number).set_result(draft)

    async def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        self._count += 1
        self._pending[self._count] = asyncio.get_running_loop().create_future()
        generate = GenerateRequest(
            prompt_token_ids=tuple(request.prompt_token_ids),
            output_token_ids=tuple(request.output_token_ids),
            sampling_params=request.sampling_params,
            stream_interval=NO_STREAMING,
        )
        self._pipe.send((self._count, generate))
        yield await self._pending[self._count]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        self._pipe.close()

    def _receive(self) -> tuple[int, TokenDelta] | None:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            return None


async def run_requests(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], in_flight: int
) -> tuple[float, list[Usage]]:
    """Returns the seconds for all requests, and the usage of each."""
    slots = asyncio.Semaphore(in_flight)
    usages: list[Usage] = []

    async def run_one(prompt: Sequence[int]) -> None:
        async with slots:
            *_, finished = [
                event
                async for event in pipeline.generate(GenerationRequest(prompt, sampling_params=GREEDY, mode="full"))
            ]
            assert isinstance(finished, Finished)
            usages.append(finished.usage)

    started = time.perf_counter()
    await asyncio.gather(*(run_one(prompt) for prompt in prompts))
    return time.perf_counter() - started, usages


async def compare(
    models: Path, prompts: Sequence[Sequence[int]], *, max_num_seqs: int, in_flight: int, rounds: int
) -> dict[str, Any]:
    """Compares several requests in flight with one request at a time."""
    target, draft = (
        EngineSettings(model=str(models / name), num_threads=1, max_num_seqs=max_num_seqs)
        for name in ("demo-target", "demo-draft")
    )
    drafter, engine = PipeDrafter(draft), load_native_engine(target)
    tokenizer = engine.model.tokenizer
    verification = VerificationSettings.for_model(target.model)
    pipeline = Pipeline(
        verifier=engine,
        capabilities=engine.capabilities(),
        tokenizer=tokenizer,
        suffix=build_verification_suffix(tokenizer, verification.prompt),
        settings=verification,
        drafter=drafter,
    )
    listen_task = asyncio.create_task(drafter.listen())
    await run_requests(pipeline, prompts[:2], 1)
    sequential_s = pipelined_s = draft_s = target_s = 0.0
    ratios = []
    for part in [prompts[first::rounds] for first in range(rounds)]:
        # Both take turns, so that a change of the machine's speed affects both.
        engine.core.reset_prefix_cache()
        seconds, usages = await run_requests(pipeline, part, 1)
        sequential_s += seconds
        draft_s += sum(usage.seconds("draft") for usage in usages)
        target_s += sum(usage.seconds("judge", "write") for usage in usages)
        engine.core.reset_prefix_cache()
        part_pipelined_s, _ = await run_requests(pipeline, part, in_flight)
        pipelined_s += part_pipelined_s
        ratios.append(seconds / part_pipelined_s)
    drafter.close()
    await listen_task
    engine.shutdown()
    bound = (draft_s + target_s) / max(draft_s, target_s)
    return {
        "in_flight": in_flight,
        "draft_ms": draft_s / len(prompts) * 1e3,
        "target_ms": target_s / len(prompts) * 1e3,
        "one_by_one_per_s": len(prompts) / sequential_s,
        "pipelined_per_s": len(prompts) / pipelined_s,
        "ratios": ratios,
        "ratio": statistics.geometric_mean(ratios),
        "ratio_interval": rounds_interval(ratios),
        "bound": bound,
        "of_bound": statistics.geometric_mean(ratios) / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=60, help="number of problems (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds into which they are divided (default: 5)")
    parser.add_argument("--seed", type=int, default=5, help="seed of the problems (default: 5)")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the models")
    add_json_argument(parser)
    args = parser.parse_args()
    if not 1 <= args.rounds <= args.problems:
        parser.error("--rounds: at least 1, and at most the number of problems")
    description = describe_run(problems=args.problems, seeds=[args.seed])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.models / "demo-target")
    prompts = [
        chat_prompt_token_ids(tokenizer, [{"role": "user", "content": problem.question}])
        for problem in measure.draw_problems(args.seed, args.problems, split="bench")
    ]
    result = {
        "run": description,
        "single": asyncio.run(compare(args.models, prompts, max_num_seqs=1, in_flight=3, rounds=args.rounds)),
        "batched": asyncio.run(compare(args.models, prompts, max_num_seqs=32, in_flight=8, rounds=args.rounds)),
    }
    write_output(result, table(result), args.json)


def table(result: Mapping[str, Any]) -> str:
    names = "d", "t", "requests/s one by one", "in flight together", "ratio", "(d + t) / max(d, t)", "reached"
    lines = heading("", *names)
    for name, title in (("single", "one at a time on each side"), ("batched", "batched")):
        figures = result[name]
        lines.append(
            row(
                f"{title}, {figures['in_flight']} in flight",
                f"{figures['draft_ms']:.0f} ms",
                f"{figures['target_ms']:.0f} ms",
                f"{figures['one_by_one_per_s']:.1f}",
                f"{figures['pipelined_per_s']:.1f}",
                format_ratio(figures["ratio"], figures["ratio_interval"]),
                f"{figures['bound']:.2f}",
                f"{figures['of_bound']:.0%}",
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
