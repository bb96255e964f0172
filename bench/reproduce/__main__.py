"""Compares every mode of PARSE with vLLM alone on equal hardware, and writes a report.

    python -m bench.reproduce serve_vllm_demo.yaml                  # the demo pair on a CPU
    python -m bench.reproduce my_config.yaml --problems my_problems.jsonl --result '#### (\\d+)' --minutes 60

The target of the configuration must have the engine kind vllm, and the draft model the kind vllm or native. All servers
run on this machine, one after the other: the target alone, on the GPUs of the target and on all GPUs that PARSE uses,
without and with vLLM's own speculation; then PARSE in front of both; and the target alone again.

The report is written after each server, as report.html and report.json. If the command is interrupted, run it again:
finished measurements are kept.
"""

import argparse
import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.reproduce.benchmark_server import is_port_used
from bench.reproduce.environment import describe_environment, shareable_config
from bench.reproduce.hardware import UnsupportedConfig, this_machine
from bench.reproduce.html_report import render_html
from bench.reproduce.plan import ReproduceOptions, ReproducePlan, build_plan, is_demo_target
from bench.reproduce.report import build_report, read_documents
from bench.reproduce.run import OutputFolder, print_progress, read_json, run_plan
from bench.reproduce.tasks import QualityOptions, Tasks, demo_tasks, file_tasks, generated_tasks
from bench.workload import InvalidPromptFile, load_problems
from deployments.config import AppSettings
from deployments.launch import LaunchError, check_model_folders, read_config
from parse.engine_config import VLLMEngineConfig
from parse.engines.vllm.installation import VLLMUnavailable, find_python, needs_installation
from training.provenance import write_document


@dataclass(frozen=True)
class _Report:
    """Writes the report of an output folder, with the environment of each session that has measured something."""

    out: OutputFolder
    latency_bound_s: float | None
    environment: dict[str, str]
    config_text: str
    earlier_sessions: list[dict[str, Any]]
    started: float

    def write(self, num_steps: int) -> None:
        """Writes the report. A session that has measured nothing is not part of it."""
        seconds = time.monotonic() - self.started
        session = {"environment": self.environment, "seconds": seconds}
        sessions = [*self.earlier_sessions, *([session] if num_steps else [])]
        write_document(self.out.path / "run.json", {"sessions": sessions, "config_text": self.config_text})
        report = build_report(read_documents(self.out, self.latency_bound_s))
        write_document(self.out.path / "report.json", report)
        (self.out.path / "report.html").write_text(render_html(report), encoding="utf-8")


def main() -> None:
    args = _arguments()
    # SIGINT too, because a shell makes background jobs ignore it.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    started = time.monotonic()
    out = OutputFolder(args.out or Path("runs") / f"reproduce-{args.config.stem}")
    try:
        config, settings = read_config(args.config)
        plan, python = _plan(args, out, config, settings)
    except (LaunchError, UnsupportedConfig, VLLMUnavailable, InvalidPromptFile) as error:
        sys.exit(f"bench.reproduce: {error}")
    if is_port_used(args.port):
        sys.exit(f"bench.reproduce: port {args.port} is in use: choose another one with --port")
    report = _Report(
        out,
        args.latency_bound_s,
        describe_environment(this_machine(), python, args.config),
        shareable_config(config),
        (read_json(out.path / "run.json") or {}).get("sessions", []),
        started,
    )
    try:
        num_steps = run_plan(plan, out, args.minutes, report.write)
    except KeyboardInterrupt:
        if (out.path / "plan.json").exists():
            report.write(1)
        sys.exit(f"bench.reproduce: interrupted; run the same command again to continue; {out.path}/report.html")
    report.write(num_steps)
    print_progress(f"the report is {out.path / 'report.html'}")


def _plan(
    args: argparse.Namespace, out: OutputFolder, config: dict[str, Any], settings: AppSettings
) -> tuple[ReproducePlan, Path]:
    """Returns the plan, and the interpreter of the environment with vLLM. Everything is checked before it starts."""
    options = ReproduceOptions(args.config, out.path, args.clients, args.eagle3, args.all_gpus_args, args.port)
    tasks = _tasks(args, out, settings)
    engine = settings.target.engine
    python = Path(sys.executable)
    if isinstance(engine, VLLMEngineConfig):  # otherwise, build_plan says what is supported
        check_model_folders("target", settings.target)
        if settings.draft:
            check_model_folders("draft", settings.draft)
        if needs_installation(engine.executable):
            print_progress("installing vLLM for CPUs in the cache folder, which takes some minutes")
        python = find_python(engine.executable)
    return build_plan(options, config, settings, machine=this_machine(), python=python, tasks=tasks), python


def _tasks(args: argparse.Namespace, out: OutputFolder, settings: AppSettings) -> Tasks:
    options = QualityOptions(args.limit, args.max_tokens, args.tasks)
    if args.problems is not None:
        load_problems(args.problems, args.result)  # a wrong file is reported before the measurements
        return file_tasks(options, args.problems, args.result)
    return demo_tasks(options) if is_demo_target(settings) else generated_tasks(options, out.path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="the configuration of the service")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/reproduce-NAME")
    parser.add_argument(
        "--clients", type=_client_numbers, default=(1, 8, 32, 128), help="numbers of clients (default: 1,8,32,128)"
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=4.0,
        help="the time for all load measurements together, without the starts of servers and the quality. Each client "
        "sends at least one request, so they can take longer (default: 4). Use 60 or more for figures that you publish",
    )
    parser.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help='lines of {"prompt" or "messages": ..., "answer": ...}. Without it, the problems are generated',
    )
    parser.add_argument(
        "--result",
        metavar="REGEX",
        help="finds the result in an answer to a problem of the file: its last match, or the first group of it, must "
        "be `answer`. Without it, `answer` must occur in the text",
    )
    parser.add_argument(
        "--tasks", type=_words, default=(), help="tasks of bench.quality (default: the problems of the load)"
    )
    parser.add_argument("--limit", type=_positive_integer, default=60, help="problems of each task (default: 60)")
    parser.add_argument(
        "--max-tokens", type=_positive_integer, help="of an answer (default: 240 for the demo, or 1024)"
    )
    parser.add_argument("--eagle3", metavar="HEAD", help="an EAGLE-3 head for the target, an id or a folder")
    parser.add_argument(
        "--all-gpus-args",
        type=_json_object,
        metavar="JSON",
        help="engine_args of vLLM, such as parallel sizes, for the baselines on all GPUs that PARSE uses. By default, "
        "they are chosen so that exactly this number of GPUs is used",
    )
    parser.add_argument(
        "--latency-bound-s",
        type=_positive,
        metavar="S",
        help="the bound of the 95th percentile of the latency (default: twice that of the target alone, with the "
        "smallest number of clients)",
    )
    parser.add_argument("--port", type=_positive_integer, default=8700, help="the port of all servers (default: 8700)")
    args = parser.parse_args()
    try:
        re.compile(args.result or "")
    except re.error as error:
        parser.error(f"--result: {error}")
    if args.result and not args.problems:
        parser.error("--result needs --problems")
    return args


def _client_numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted(_positive_integer(part) for part in text.split(",")))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"must be different numbers, got {text}")
    return numbers


def _positive_integer(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


if __name__ == "__main__":
    main()
