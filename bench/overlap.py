"""Drafting the next request while the current one is verified: two processes, one thread each.

    python -m bench.overlap --problems 60 --json -

One by one, a request takes d for its draft and t for what the target does; pipelined, the slower of the two bounds the
pace, so that at best (d + t) / max(d, t) times as many requests are done in the same time. First with a single request
at a time on either side, then with batches.
"""

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.contenders import GREEDY
from parse.config import EngineSettings, VerificationSettings
from parse.engines.loader import load_native_engine
from parse.events import Finished, Usage
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import DraftRequest, GenerateRequest, GenerationRequest
from parse.types import NO_STREAMING, TokenDelta
from training import measure
from training.evaluate import MODELS


def serve_drafts(settings: EngineSettings, pipe: Connection) -> None:
    """Runs the drafter's process: it writes complete drafts, as many at once as its engine runs."""
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
    """The other end of the pipe."""

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
    """Seconds for all of them, and what each took."""
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
    models: Path, prompts: Sequence[Sequence[int]], *, max_num_seqs: int, in_flight: int
) -> dict[str, Any]:
    """Requests per second with so many in flight over one by one."""
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
    half = len(prompts) // 2
    sequential_s = pipelined_s = draft_s = target_s = 0.0
    for part in (prompts[:half], prompts[half:]):  # in turns: a change of pace falls on both
        engine.core.reset_prefix_cache()
        seconds, usages = await run_requests(pipeline, part, 1)
        sequential_s += seconds
        draft_s += sum(usage.seconds("draft") for usage in usages)
        target_s += sum(usage.seconds("judge", "write") for usage in usages)
        engine.core.reset_prefix_cache()
        pipelined_s += (await run_requests(pipeline, part, in_flight))[0]
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
        "ratio": sequential_s / pipelined_s,
        "bound": bound,
        "of_bound": sequential_s / pipelined_s / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--json", help="where the figures go; - for standard output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.models / "demo-target")
    prompts = [
        chat_prompt_token_ids(tokenizer, [{"role": "user", "content": problem.question}])
        for problem in measure.draw_problems(args.seed, args.problems, split="bench")
    ]
    result = {
        "single": asyncio.run(compare(args.models, prompts, max_num_seqs=1, in_flight=3)),
        "batched": asyncio.run(compare(args.models, prompts, max_num_seqs=32, in_flight=8)),
    }
    text = json.dumps(result, indent=2)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
