"""Measures the demo pair on problems that training never saw, and writes its model cards.

    python -m training.evaluate --problems 300 --json -          # print the figures
    python -m training.evaluate --problems 3000 --seed 7 --card  # write figures.json, README.md and verifier.svg

An answer with an error counts as wrong even if its last line is correct. `--card` writes into the folders of the two
models. The model cards explain the figures.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from parse.acceptance import Thresholds
from parse.prefixes import DEFAULT_STRIDE
from training import measure
from training.cards import write_cards
from training.checkpoints import BrokenModel, load_model, load_tokenizer
from training.confidence import share_figures
from training.loop import DamagedCheckpoint
from training.plots import draw_verifier
from training.provenance import describe_run, write_document

MODELS = Path(__file__).resolve().parent.parent / "models"
SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DECIMALS = 4


def load_pair(folder: Path) -> measure.ModelPair:
    target, draft = folder / "demo-target", folder / "demo-draft"
    models = load_model(draft), load_model(target)
    tokenizer = load_tokenizer(target)
    if load_tokenizer(draft).get_vocab() != tokenizer.get_vocab():
        raise BrokenModel(f"{draft} and {target} do not have the same vocabulary")
    return measure.ModelPair(*models, tokenizer)


@dataclass(frozen=True)
class EvaluationPlan:
    """The problems of an evaluation, and how drafts are verified."""

    problems: int
    seed: int
    stride: int = DEFAULT_STRIDE
    thresholds: Thresholds = Thresholds()
    split: str = "evaluation"


def evaluate_pair(pair: measure.ModelPair, plan: EvaluationPlan) -> dict[str, Any]:
    run = describe_run(problems=plan.problems, seeds=[plan.seed])
    builder, problems = pair.example_builder, measure.draw_problems(plan.seed, plan.problems, plan.split)
    draft_answers = measure.generate_answers(pair.draft, builder, problems)
    target_answers = measure.generate_answers(pair.target, builder, problems)
    target_correctness = measure.correctness(builder, problems, target_answers)
    drafts = measure.verify_drafts(pair, problems, draft_answers, plan.stride)
    ece, curve = measure.reliability(drafts)
    verifier = measure.verifier_metrics(drafts, plan.thresholds)
    cost = measure.measure_costs(pair, drafts)
    full_answer_share = statistics.fmean(d.accepted_prefix_length(plan.thresholds) == len(d.tokens) for d in drafts)
    by_family = {
        name: {
            "draft": statistics.fmean(d.is_correct for d in drafts if d.problem.family == name),
            "target": statistics.fmean(
                correct for g, correct in zip(problems, target_correctness, strict=True) if g.family == name
            ),
        }
        for name in dict.fromkeys(g.family for g in problems)
    }
    return {
        "run": run,
        "problems": plan.problems,
        "seed": plan.seed,
        "split": plan.split,
        "stride": plan.stride,
        "thresholds": {"full": plan.thresholds.full, "prefix": plan.thresholds.prefix},
        "draft": {
            **share_figures("accuracy", [d.is_correct for d in drafts]),
            "ms_per_token": cost.draft_token,
            "tokens": statistics.fmean(len(d.tokens) for d in drafts),
        },
        "target": {
            **share_figures("accuracy", target_correctness),
            **share_figures("continuation_accuracy", measure.continuation_correctness(pair, drafts, plan.seed)),
            "ms_per_token": cost.target_token,
            "tokens": statistics.fmean(map(len, target_answers)),
        },
        "families": by_family,
        "cost_ratio": cost.target_token / cost.draft_token,
        "costs_ms": asdict(cost),
        "token_agreement": measure.token_agreement(pair, drafts),
        "verifier": {
            **verifier,
            "ece": ece,
            "reliability": [dict(zip(("mean_p", "right", "count"), point, strict=True)) for point in curve],
            "sweep": [_sweep_entry(drafts, threshold) for threshold in SWEEP],
        },
        "ideal_speedup": measure.ideal_speedup(
            cost, drafts, target_answers, verifier["accepted_share"], full_answer_share
        ),
    }


def _sweep_entry(drafts: Sequence[measure.VerifiedDraft], threshold: float) -> dict[str, Any]:
    """Returns the verifier's figures at one threshold, without counts and intervals."""
    metrics = measure.verifier_metrics(drafts, Thresholds(full=threshold, prefix=threshold))
    return {"threshold": threshold} | {
        name: value for name, value in metrics.items() if not name.endswith(("_count", "_interval"))
    }


def round_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: round_floats(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(inner) for inner in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=_positive, default=300, metavar="N", help="number of problems")
    parser.add_argument("--seed", type=int, default=1, help="seed of the problems")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder with demo-target and demo-draft")
    parser.add_argument("--stride", type=_positive, default=DEFAULT_STRIDE, help="tokens between prefix lengths")
    parser.add_argument("--full", type=_share, default=Thresholds.full, help="P(correct) that accepts a complete draft")
    parser.add_argument("--prefix", type=_share, default=Thresholds.prefix, help="P(correct) that keeps a prefix")
    parser.add_argument("--json", metavar="PATH", help="file for the figures; - is standard output (default)")
    parser.add_argument("--card", action="store_true", help="write figures, cards and picture into the models' folders")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the threshold sweep and the reliability curve")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads for arithmetic")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        pair = load_pair(args.models)
    except (BrokenModel, DamagedCheckpoint) as error:
        sys.exit(str(error))
    plan = EvaluationPlan(args.problems, args.seed, args.stride, Thresholds(args.full, args.prefix))
    metrics = round_floats(evaluate_pair(pair, plan))
    if args.card:
        write_cards(metrics, args.models / "demo-target", args.models / "demo-draft")
    if args.json and args.json != "-":
        write_document(Path(args.json), metrics)
    elif args.json or not args.card:
        print(json.dumps(metrics, indent=2))
    if args.plot:
        draw_verifier(metrics["verifier"], args.plot)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {value}")
    return value


if __name__ == "__main__":
    main()
