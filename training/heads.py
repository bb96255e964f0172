"""The command line that trains a head or adapters: outputs, training, figures and card. Each step can be resumed."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from parse.errors import RequestError
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle_head import EagleHead
from training.acceptance import evaluate_head, generate_held_out
from training.checkpoints import BrokenModel, load_model, load_tokenizer
from training.evaluate import MODELS
from training.head_cards import write_card
from training.head_checkpoints import save_head
from training.loop import DamagedCheckpoint
from training.outputs import TargetOutput, demo_prompts, read_outputs, read_prompts, start_target, write_outputs
from training.plots import draw_log
from training.provenance import describe_run

DEMO = MODELS / "demo-target"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EVAL_SHARE, MAX_EVAL = 0.05, 200  # share of the given outputs that is held out for the figures

M = TypeVar("M")

Train = Callable[[PreTrainedModel, Sequence[TargetOutput], Path], M]
"""Trains on texts for a network, with checkpoints and log in a folder."""


@dataclass(frozen=True)
class Publisher(Generic[M]):
    """How a trained head is saved and evaluated."""

    save: Callable[[M, Path, torch.dtype], None]
    evaluate: Callable[[Path, PreTrainedModel, Sequence[TargetOutput]], dict[str, Any]]


HEAD_PUBLISHER = Publisher[EagleHead](lambda head, folder, dtype: save_head(head, folder, dtype=dtype), evaluate_head)


def build_parser(
    name: str, description: str, steps: int, rate: float, texts: int, ahead: int
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m training.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--outputs", type=Path, metavar="JSONL", help="outputs of the target, from training.outputs")
    source.add_argument(
        "--prompts", type=Path, metavar="JSONL", help="prompts for the target; the default is the demo task"
    )
    parser.add_argument("--target", type=Path, default=DEMO, help="folder of the target")
    parser.add_argument("--out", type=Path, default=MODELS / f"demo-{name}", help="folder for the result")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs") / name, help="folder for checkpoints, log and outputs"
    )
    parser.add_argument("--count", type=int, default=4000, help="outputs to generate if none are given")
    parser.add_argument("--longest", type=int, default=512, help="maximum tokens of an output")
    parser.add_argument("--context", type=int, default=4096, help="maximum tokens of a prompt with its output")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--rate", type=float, default=rate, help="the highest learning rate")
    parser.add_argument("--texts", type=int, default=texts, help="outputs in a batch")
    parser.add_argument("--ahead", type=int, default=ahead, help="tokens predicted from each anchor")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="a trained head to continue from")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the saved weights")
    parser.add_argument("--trained", metavar="TEXT", help="how it was trained, for its card; the default names one run")
    parser.add_argument("--held-out", type=int, default=200, help="problems on which the figures are measured")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, batches and weights")
    parser.add_argument("--threads", type=int, help="CPU threads for arithmetic")
    return parser


def add_size_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--draft-vocabulary", type=int, metavar="N", help="use the N most frequent tokens; the default is all"
    )
    parser.add_argument("--intermediate", type=int, help="width of the MLP; the default is the target's")
    parser.add_argument("--memory-mb", type=int, default=4096, help="memory for cached features")
    return parser


def recipe_arguments(args: argparse.Namespace, *extra: str) -> dict[str, Any]:
    """Returns the arguments that belong to the recipe."""
    names = "steps", "rate", "texts", "ahead", "start", "seed", *extra
    return {name: getattr(args, name) for name in names}


def head_recipe_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return recipe_arguments(args, "draft_vocabulary", "intermediate", "memory_mb")


def run(args: argparse.Namespace, train: Train[M], publisher: Publisher[M]) -> None:
    """Trains, and writes the result with its figures into its folder."""
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        _run(args, train, publisher)
    except (BrokenModel, DamagedCheckpoint, ProposerLoadError, RequestError, ValueError, OSError) as error:
        sys.exit(str(error))


def _run(args: argparse.Namespace, train: Train[M], publisher: Publisher[M]) -> None:
    run_description = describe_run(problems=args.held_out, seeds=[args.seed])
    texts = read_outputs(args.outputs or _generate_outputs(args))
    network = load_model(args.target)
    nn.Module.to(network, "cuda" if torch.cuda.is_available() else "cpu")
    demo = not (args.outputs or args.prompts)
    num_held_out = 0 if demo else min(MAX_EVAL, max(1, round(EVAL_SHARE * len(texts))))
    model = train(network, texts[: len(texts) - num_held_out], args.runs)
    publisher.save(model, args.out, DTYPES[args.dtype])
    log = args.runs / "log.jsonl"
    last_entry = json.loads(log.read_text().splitlines()[-1])
    draw_log(log, args.out / "training.svg", [key for key in last_entry if key.startswith("same")])
    held_out = (
        generate_held_out(str(args.target), args.held_out, args.seed, args.threads) if demo else texts[-num_held_out:]
    )
    steps = f"{args.steps} {'more ' if args.start else ''}steps"
    trained = args.trained or f"{steps}, {len(texts) - num_held_out} texts that the target generated"
    metrics = {"trained": trained, "run": run_description, **publisher.evaluate(args.out, network, held_out)}
    write_card(args.out, metrics, args.target.name)


def _generate_outputs(args: argparse.Namespace) -> Path:
    path: Path = args.runs / "outputs.jsonl"
    engine = start_target(str(args.target), args.threads, args.context)
    try:
        tokenizer = load_tokenizer(args.target)
        prompts = (
            read_prompts(args.prompts, tokenizer) if args.prompts else demo_prompts(args.target, tokenizer, args.seed)
        )
        write_outputs(engine, prompts, args.count, path, max_tokens=args.longest)
    finally:
        engine.shutdown()
    return path
