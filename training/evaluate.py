"""Measures the demo pair on problems that training never saw.

    python -m training.evaluate --problems 500 --seed 7 --json -

An answer with an error counts as wrong even if its last line is right. The model cards explain the figures.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from parse.acceptance import Thresholds
from parse.prefixes import DEFAULT_STRIDE
from training import measure
from training.checkpoints import BrokenModel, load_model, load_tokenizer
from training.loop import DamagedCheckpoint
from training.plots import draw_verifier

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


def evaluate_pair(
    pair: measure.ModelPair, count: int, seed: int, stride: int, thresholds: Thresholds, split: str = "evaluation"
) -> tuple[dict[str, Any], list[measure.VerifiedDraft]]:
    builder, problems = pair.example_builder, measure.draw_problems(seed, count, split)
    draft_answers = measure.generate_answers(pair.draft, builder, problems)
    target_answers = measure.generate_answers(pair.target, builder, problems)
    drafts = measure.verify_drafts(pair, problems, draft_answers, stride)
    ece, curve = measure.reliability(drafts)
    verifier = measure.verifier_metrics(drafts, thresholds)
    cost = measure.measure_costs(pair, drafts)
    full_answer_share = statistics.fmean(d.accepted_prefix_length(thresholds) == len(d.tokens) for d in drafts)
    by_family = {
        name: {
            "draft": statistics.fmean(d.is_correct for d in drafts if d.problem.family == name),
            "target": statistics.fmean(
                measure.is_correct(builder, g, a)
                for g, a in zip(problems, target_answers, strict=True)
                if g.family == name
            ),
        }
        for name in dict.fromkeys(g.family for g in problems)
    }
    return {
        "problems": count,
        "seed": seed,
        "stride": stride,
        "thresholds": {"full": thresholds.full, "prefix": thresholds.prefix},
        "draft": {
            "accuracy": statistics.fmean(d.is_correct for d in drafts),
            "ms_per_token": cost.draft_token,
            "tokens": statistics.fmean(len(d.tokens) for d in drafts),
        },
        "target": {
            "accuracy": measure.accuracy(builder, problems, target_answers),
            "continuation_accuracy": measure.continuation_accuracy(pair, drafts, seed),
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
            "sweep": [
                {
                    "threshold": threshold,
                    **measure.verifier_metrics(drafts, Thresholds(full=threshold, prefix=threshold)),
                }
                for threshold in SWEEP
            ],
        },
        "ideal_speedup": measure.ideal_speedup(
            cost, drafts, target_answers, verifier["accepted_share"], full_answer_share
        ),
    }, drafts


def round_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: round_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [round_floats(inner) for inner in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=_positive, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder with demo-target and demo-draft")
    parser.add_argument("--stride", type=_positive, default=DEFAULT_STRIDE, help="tokens between prefix lengths")
    parser.add_argument("--full", type=_share, default=Thresholds.full, help="P(correct) that accepts a complete draft")
    parser.add_argument("--prefix", type=_share, default=Thresholds.prefix, help="P(correct) that keeps a prefix")
    parser.add_argument("--json", default="-", metavar="PATH", help="where the figures go; - is stdout")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the threshold sweep and the reliability curve")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        pair = load_pair(args.models)
    except (BrokenModel, DamagedCheckpoint) as error:
        sys.exit(str(error))
    metrics, _ = evaluate_pair(pair, args.problems, args.seed, args.stride, Thresholds(args.full, args.prefix))
    text = json.dumps(round_floats(metrics), indent=2)
    if args.json == "-":
        print(text)
    else:
        Path(args.json).write_text(text + "\n")
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
