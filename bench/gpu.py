"""Measures the engine on a GPU against the limits of the hardware, with random weights in the shapes of real models.

    python -m bench.gpu --shape qwen3-8b
    python -m bench.gpu --shape qwen3-32b --batches 1,8,32 --profile --json 32b.json

`bench/gpu.sh` runs this program for two shapes, after the tests that need a GPU.

The limit of decoding is the bytes that a step must read, and the limit of prompts is their multiplications, at the
rates that a plain copy and a plain matrix product reach on the same device immediately before. Verification is counted
in decode steps. The engine is measured without CUDA graphs (eager) and with them, and then `generate()`.

The document is written after each measurement. A measurement that fails is listed in it, and the others go on. The
program then ends with exit code 1.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from bench import gpu_measurements as measurements
from bench.gpu_plan import BenchmarkPlan
from bench.gpu_table import table
from bench.output import add_json_argument, write_output
from bench.roofline import SHAPES, build_model, copy_bytes_per_s, matmul_flops_per_s, roofline_costs
from parse.demo import DEMO_TARGET
from parse.engines.native.engine import NativeEngine
from parse.engines.native.model import Model
from parse.prefixes import DEFAULT_STRIDE, prefix_lengths_every
from training.provenance import describe_run, write_document

MODES = {"eager": False, "cuda_graphs": True}

Measurement = tuple[tuple[str, ...], Callable[[], Any]]
"""The place of a figure in the document, and what measures it."""


class ResultDocument:
    """The figures of a run, which are written to a file after each measurement."""

    def __init__(self, figures: dict[str, Any], file: Path | None) -> None:
        self.figures, self._file = figures, file
        self.errors: dict[str, str] = figures.setdefault("errors", {})
        self._seconds: dict[str, float] = figures.setdefault("seconds", {})

    def measure(self, path: Sequence[str], work: Callable[[], Any]) -> None:
        """Stores what `work` returns at this path of the document."""
        with self.section("/".join(path)):
            *parents, key = path
            value = work()
            parent = self.figures
            for each in parents:
                parent = parent.setdefault(each, {})
            parent[key] = value

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Records how long a block takes, and its error. The program continues after the block in any case."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {error}"
        self._seconds[name] = round(time.perf_counter() - started, 2)
        print(f"{name}: {self._seconds[name]:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        if self._file is not None:
            write_document(self._file, self.figures)


def engine_measurements(engine: NativeEngine, plan: BenchmarkPlan) -> Iterator[Measurement]:
    decode = partial(measurements.measure_decode, engine, plan)
    for batch in plan.batch_sizes:
        yield ("decode", str(batch)), partial(decode, batch, temperature=0.0)
    for draft_tokens in plan.draft_lengths:
        yield (
            ("verification", str(draft_tokens)),
            partial(measurements.measure_verification, engine, plan, draft_tokens),
        )
    yield ("fused_call",), partial(measurements.measure_fused_call, engine, plan)
    yield (
        ("verification_while_decoding_ms",),
        partial(measurements.measure_verification_while_decoding, engine, plan),
    )
    largest = max(plan.batch_sizes)
    yield ("sampled", str(largest)), partial(decode, largest, temperature=0.8, top_p=0.95)
    yield ("prompt_tokens_per_s",), partial(measurements.measure_prompts, engine, plan)


def generate_measurements(network: PreTrainedModel, plan: BenchmarkPlan) -> Iterator[Measurement]:
    for batch in plan.batch_sizes:
        yield ("generate", "decode", str(batch)), partial(measurements.measure_generate, network, plan, batch)
    short = min(plan.draft_lengths)
    lengths = prefix_lengths_every(DEFAULT_STRIDE, short, complete=True)
    yield (
        ("generate", "one_by_one_ms", str(short)),
        partial(measurements.measure_one_by_one, network, plan, lengths),
    )


def run(name: str, plan: BenchmarkPlan, device: torch.device, results: ResultDocument, *, profile: bool) -> None:
    """Measures everything, the most important figures first."""
    shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
    results.figures |= {
        "shape": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "context": plan.prompt_tokens,
        "num_decoding": plan.num_decoding,
        "rounds": plan.rounds,
    }
    results.measure(["roofline"], partial(measure_roofline, name, plan, device, dtype))
    measurements.free_memory(device)
    network = build_model(shape, device, dtype)
    weight_bytes = sum(parameter.nbytes for parameter in network.parameters())
    results.measure(["memory_gib", "weights"], lambda: weight_bytes / 2**30)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TARGET)
    model = Model(network, tokenizer, name)
    measurements.peak_memory_gib(device)
    for mode in MODES:
        with results.section(mode):
            measure_mode(mode, model, plan, results)
        results.measure(["memory_gib", mode], partial(measurements.peak_memory_gib, device))
        measurements.free_memory(device)
    measurements.restore_library_functions(network)
    for path, work in generate_measurements(network, plan):
        results.measure(path, work)
        measurements.free_memory(device)
    if profile:
        model = Model(network, tokenizer, name)
        for mode in MODES:
            with results.section(f"profile/{mode}"):
                profile_mode(mode, model, plan, results)
            measurements.free_memory(device)


def measure_mode(mode: str, model: Model, plan: BenchmarkPlan, results: ResultDocument) -> None:
    """Measures an engine. Its KV cache can be freed when this function has returned."""
    with measurements.start_engine(model, plan, MODES[mode]) as engine:
        for path, work in engine_measurements(engine, plan):
            results.measure([mode, *path], work)


def profile_mode(mode: str, model: Model, plan: BenchmarkPlan, results: ResultDocument) -> None:
    with measurements.start_engine(model, plan, MODES[mode]) as engine:
        for batch in sorted({min(plan.batch_sizes), max(plan.batch_sizes)}):
            work = partial(measurements.profile_decode, engine, plan, batch)
            results.measure(["profile", mode, str(batch)], work)


def measure_roofline(name: str, plan: BenchmarkPlan, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the rates of plain operations, and the limits of a model that follow from them."""
    copied, multiplied = copy_bytes_per_s(device), matmul_flops_per_s(device, dtype)
    costs = roofline_costs(SHAPES[name], dtype.itemsize)
    cache_bytes = plan.prompt_tokens * costs.token_bytes
    return {
        "copied_tb_per_s": copied * 1e-12,
        "multiplied_tflops": multiplied * 1e-12,
        "decode_ms": {
            str(batch): (costs.step_bytes + batch * cache_bytes) / copied * 1e3 for batch in plan.batch_sizes
        },
        "prompt_tokens_per_s": multiplied / costs.token_flops,
    }


def positive_numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers of a list such as `1,8,32`, in ascending order."""
    numbers = tuple(sorted({int(number) for number in text.split(",")}))
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return numbers


def parse_arguments() -> argparse.Namespace:
    defaults = BenchmarkPlan()
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument(
        "--batches",
        type=positive_numbers,
        default=tuple(defaults.batch_sizes),
        help="requests that decode at the same time (default: 1,8,32)",
    )
    parser.add_argument(
        "--drafts",
        type=positive_numbers,
        default=tuple(defaults.draft_lengths),
        help="tokens of the drafts that are verified (default: 250,1000,4000)",
    )
    parser.add_argument("--context", type=int, default=defaults.prompt_tokens, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="the result is the median of them")
    parser.add_argument("--decode-tokens", type=int, default=defaults.decode_tokens, help="tokens of each answer")
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=defaults.max_num_batched_tokens,
        help="maximum tokens computed in one pass",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="profile the device while it decodes")
    add_json_argument(parser)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here; `--device cpu --shape tiny` tries the program")
    if min(args.context, args.rounds, args.max_num_batched_tokens) < 1 or args.decode_tokens < 2:
        parser.error("--context, --rounds, --max-num-batched-tokens: at least 1; --decode-tokens: at least 2")
    return args


def main() -> None:
    args = parse_arguments()
    plan = BenchmarkPlan(
        prompt_tokens=args.context,
        batch_sizes=args.batches,
        draft_lengths=args.drafts,
        max_num_batched_tokens=args.max_num_batched_tokens,
        rounds=args.rounds,
        decode_tokens=args.decode_tokens,
    )
    file = Path(args.json) if args.json and args.json != "-" else None
    results = ResultDocument({"run": describe_run()}, file)
    with results.section("run"):
        run(args.shape, plan, torch.device(args.device), results, profile=args.profile)
    write_output(results.figures, table(results.figures), args.json)
    if results.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
