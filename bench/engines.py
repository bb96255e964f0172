"""Compares vLLM alone, vLLM with its own speculation, and PARSE in front of both, on the same problems in one run.

    python -m bench.engines --start-vllm --problems 100 --seed 5 --concurrency 1,8 --json engines.json
    python -m bench.engines --target-url http://127.0.0.1:8001 --problems 20     # a server that runs already

With `--start-vllm`, an unmodified vLLM for CPUs is installed in an environment of its own, and a
server is started for each configuration. All of them stay up, and the contenders take turns on groups of problems, so
that a change of the machine's speed affects all of them.

`vllm` has the threads that PARSE gives the target. `vllm-all-cores` has all cores that PARSE uses, drafter included.
`vllm-managed` is a vLLM that PARSE itself starts and supervises, as in a replica with `engine: {kind: vllm}`.
`ratio` compares requests per second with `vllm`.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bench.output import add_json_argument, heading, milliseconds, row, write_output
from bench.vllm_server import ServerOptions, cpu_environment, running
from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_DRAFT_PARALLEL, DEMO_EAGLE3, DEMO_PARALLEL, DEMO_TARGET
from parse.engine_config import RemoteEngineConfig, VLLMEngineConfig
from parse.engines.protocol import Engine
from parse.events import TextDelta
from parse.pair import Pair
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams
from training.confidence import rounds_interval, share_figures
from training.measure import draw_problems
from training.provenance import describe_run
from training.task import Problem, check_answer

MAX_MODEL_LEN = 1024
NUM_SPECULATIVE_TOKENS = 8
PROBLEMS_PER_CLIENT = 4
SERVERS: Mapping[str, Mapping[str, Any]] = {
    "vllm": {},
    "vllm-block-32": {"block_size": 32},  # the default of vLLM for CPUs, 128, is longer than most prompts of this task
    "vllm-all-cores": {"num_threads": os.cpu_count() or 1},
    "vllm-ngram": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    },
    "vllm-eagle3": {
        "block_size": 32,
        "speculative_config": {
            "method": "eagle3",
            "model": DEMO_EAGLE3,
            "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        },
    },
}
MANAGED = "vllm-managed"
PARSE_SUFFIXES = {"vllm-block-32": "", "vllm-eagle3": "-eagle3", MANAGED: "-managed", "given": ""}
"""The servers that PARSE uses, and what follows the mode in the name of the contender."""
PARSE_MODES = "full", "rounds", "progressive", "exact"


@dataclass(frozen=True)
class Response:
    text: str
    num_tokens: int
    ttft_s: float


@dataclass(frozen=True)
class Contender:
    """A way to answer a prompt."""

    name: str
    answer: Callable[[str], Awaitable[Response]]


def pipeline_contender(name: str, pair: Pair, mode: str, method: str | None = None) -> Contender:
    async def answer(prompt: str) -> Response:
        started, ttft_s, num_tokens, text = time.perf_counter(), 0.0, 0, ""
        events = pair.astream(prompt, mode=mode, temperature=0, max_tokens=240, speculative_method=method)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TextDelta):
                    ttft_s = ttft_s or time.perf_counter() - started
                    num_tokens += len(event.token_ids)
                    text += event.text
        return Response(text, num_tokens, ttft_s)

    return Contender(name, answer)


def remote_settings(url: str) -> EngineSettings:
    engine = RemoteEngineConfig(kind="remote", url=url)
    return EngineSettings(model=DEMO_TARGET, max_model_len=MAX_MODEL_LEN, engine=engine)


def managed_settings() -> EngineSettings:
    """The settings of a vLLM that is started and supervised, with the same arguments as `vllm-block-32`."""
    engine = VLLMEngineConfig(
        kind="vllm",
        engine_args={"dtype": "float32", "enforce_eager": True, **SERVERS["vllm-block-32"]},
        environment=cpu_environment(num_threads=1),
    )
    return EngineSettings(model=DEMO_TARGET, max_model_len=MAX_MODEL_LEN, engine=engine)


def draft_settings() -> EngineSettings:
    head = SpeculativeConfig(method="parallel", model=DEMO_DRAFT_PARALLEL)
    return EngineSettings(model=DEMO_DRAFT, num_threads=1, max_model_len=MAX_MODEL_LEN, speculative_configs=(head,))


def native_pair() -> Pair:
    methods = (SpeculativeConfig(method="parallel", model=DEMO_PARALLEL),)
    target = EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=MAX_MODEL_LEN, speculative_configs=methods)
    return Pair(target, draft_settings())


def contender_names(server: str) -> dict[str, str]:
    """Returns the names of the contenders that use a server, each with its mode.

    `off` calls the server once and adds nothing, so it is the server alone.
    """
    suffix = PARSE_SUFFIXES.get(server)
    return {server: "off"} | ({} if suffix is None else {f"parse-{mode}{suffix}": mode for mode in PARSE_MODES})


def contenders_of_server(server: str, pair: Pair) -> list[Contender]:
    modes = ("off", *pair.pipeline.capabilities.modes)
    return [pipeline_contender(name, pair, mode) for name, mode in contender_names(server).items() if mode in modes]


async def run_turns(
    contenders: Sequence[Contender], problems: Sequence[Problem], concurrency: int, groups: int
) -> dict[str, list[tuple[float, list[Response]]]]:
    """Returns the seconds and the answers of each contender for each group of problems."""
    results: dict[str, list[tuple[float, list[Response]]]] = {contender.name: [] for contender in contenders}
    for number in range(groups):
        group = problems[number::groups]
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            slots = asyncio.Semaphore(concurrency)

            async def answer(
                problem: Problem, contender: Contender = contender, slots: asyncio.Semaphore = slots
            ) -> Response:
                async with slots:
                    return await contender.answer(problem.question)

            started = time.perf_counter()
            answers = await asyncio.gather(*map(answer, group))
            results[contender.name].append((time.perf_counter() - started, list(answers)))
    return results


def summarize(
    results: Mapping[str, Sequence[tuple[float, Sequence[Response]]]],
    problems: Sequence[Problem],
    concurrency: int,
    groups: int,
) -> list[dict[str, Any]]:
    grouped_problems = [problem for number in range(groups) for problem in problems[number::groups]]
    base = results.get("vllm") or results.get("given")
    runs = []
    for name, own_groups in results.items():
        answers = [answer for _, group in own_groups for answer in group]
        seconds = sum(group_s for group_s, _ in own_groups)
        ratios = [base_s / group_s for (base_s, _), (group_s, _) in zip(base, own_groups, strict=True)] if base else []
        correct = [
            check_answer(problem, [answer.text]).complete
            for problem, answer in zip(grouped_problems, answers, strict=True)
        ]
        runs.append(
            {
                "contender": name,
                "concurrency": concurrency,
                "requests_per_s": len(answers) / seconds,
                "tokens_per_s": sum(answer.num_tokens for answer in answers) / seconds,
                **share_figures("accuracy", correct),
                "ttft_s": statistics.median(answer.ttft_s for answer in answers),
                "ratio": sum(base_s for base_s, _ in base) / seconds if base else None,
                "ratio_interval": rounds_interval(ratios) if ratios else None,
            }
        )
    return runs


async def verification_cost(engine: Engine, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Measures a decode step, and the verification of 13 prefixes whose draft has just been prefilled."""
    verification = VerificationSettings.for_model(DEMO_TARGET)
    suffix = build_verification_suffix(
        engine.tokenizer, verification.prompt, verification.correct, verification.incorrect
    )
    step_times, verify_times = [], []
    params = SamplingParams(temperature=0.0, max_tokens=105, ignore_eos=True)
    for prompt in prompts:
        request = GenerateRequest(prompt_token_ids=prompt, sampling_params=params)
        draft: list[int] = []
        times = []
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                draft += delta.token_ids
                times.append(time.perf_counter())
        step_times.append((times[-1] - times[0]) / (len(draft) - 1))
        verify = VerifyRequest(
            prompt_token_ids=prompt,
            draft_token_ids=draft[:104],
            prefix_lengths=range(8, 105, 8),
            suffix=suffix,
            policy=None,
        )
        started = time.perf_counter()
        await engine.verify(verify)
        verify_times.append(time.perf_counter() - started)
    step_s, verify_s = statistics.median(step_times), statistics.median(verify_times)
    return {"decode_step_s": step_s, "verify_13_prefixes_s": verify_s, "verify_in_decode_steps": verify_s / step_s}


def start_targets(args: argparse.Namespace, stack: ExitStack) -> dict[str, EngineSettings]:
    """Starts the servers that the contenders need, and returns the settings of each target."""
    targets = {"given": remote_settings(args.target_url)} if args.target_url else {}
    if args.start_vllm:
        needed = [
            name
            for name in (*SERVERS, MANAGED)
            if not args.contenders or set(contender_names(name)) & set(args.contenders)
        ]
        servers = {name: ServerOptions(DEMO_TARGET, **SERVERS[name]) for name in needed if name != MANAGED}
        started = stack.enter_context(running(*servers.values()))
        targets |= {name: remote_settings(server.url) for name, server in zip(servers, started, strict=True)}
        targets |= {MANAGED: managed_settings()} if MANAGED in needed else {}
    return targets


def measure(args: argparse.Namespace) -> dict[str, Any]:
    problems = draw_problems(args.seed, args.problems, split="bench")
    result: dict[str, Any] = {"run": describe_run(problems=args.problems, seeds=[args.seed]), "runs": []}
    with ExitStack() as stack:
        targets = start_targets(args, stack)
        pairs = {name: stack.enter_context(Pair(target, draft_settings())) for name, target in targets.items()}
        contenders = [contender for name, pair in pairs.items() for contender in contenders_of_server(name, pair)]
        native = stack.enter_context(native_pair())
        contenders += [
            pipeline_contender("native-off", native, "off", "none"),
            pipeline_contender("native-full", native, "full"),
        ]
        if args.contenders:
            contenders = [contender for contender in contenders if contender.name in args.contenders]
        prompts = prompts_of(problems[:20], native.tokenizer)
        result["verification"] = {
            name: asyncio.run(verification_cost(pair.target, prompts))
            for name, pair in pairs.items()
            if name in PARSE_SUFFIXES
        }
        for concurrency in args.concurrency:
            # A group has several problems for each client, so that few of them idle at its end.
            groups = max(1, min(args.rounds, len(problems) // (PROBLEMS_PER_CLIENT * concurrency)))
            asyncio.run(run_turns(contenders, problems[:concurrency], concurrency, 1))  # warms up all of them
            groups_by_name = asyncio.run(run_turns(contenders, problems, concurrency, groups))
            result["runs"] += summarize(groups_by_name, problems, concurrency, groups)
    return result


def prompts_of(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    messages = [[{"role": "user", "content": problem.question}] for problem in problems]
    return [list(chat_prompt_token_ids(tokenizer, each)) for each in messages]


def table(result: Mapping[str, Any]) -> str:
    lines = heading("clients", "contender", "requests/s", "ratio", "tokens/s", "accuracy", "first token")
    for run in result["runs"]:
        ratio = run["ratio"]
        lines.append(
            row(
                str(run["concurrency"]),
                run["contender"],
                f"{run['requests_per_s']:.2f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{run['tokens_per_s']:.0f}",
                f"{run['accuracy']:.1%}",
                milliseconds(run["ttft_s"]),
            )
        )
    for name, costs in result.get("verification", {}).items():
        lines.append(
            f"\n{name}: 13 prefixes take {milliseconds(costs['verify_13_prefixes_s'])}, "
            f"{costs['verify_in_decode_steps']:.1f} decode steps of {milliseconds(costs['decode_step_s'])}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=20, help="number of problems (default: 20)")
    parser.add_argument("--seed", type=int, default=5, help="seed of the problems (default: 5)")
    parser.add_argument("--rounds", type=int, default=10, help="groups into which they are divided (default: 10)")
    parser.add_argument("--concurrency", type=_numbers, default=[1], help="numbers of clients, such as 1,8")
    parser.add_argument("--contenders", type=lambda text: text.split(","), help="only these, separated by commas")
    parser.add_argument("--target-url", help="a running vLLM that serves models/demo-target")
    parser.add_argument("--start-vllm", action="store_true", help="install vLLM if necessary, and start its servers")
    add_json_argument(parser)
    args = parser.parse_args()
    if not args.target_url and not args.start_vllm:
        parser.error("pass --target-url or --start-vllm")
    torch.set_num_threads(1)
    result = measure(args)
    write_output(result, table(result), args.json)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
