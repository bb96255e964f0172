"""Trains the heads in models/ again, with the stages that trained the published ones.

    python -m training.demo_heads                 # all of them, about two hours on one core
    python -m training.demo_heads --only eagle3   # one of them

Each stage is a run of `training.eagle3`, `training.parallel` or `training.space`. Three heads belong to the target, and
`draft-parallel` to the draft model, so that it drafts several tokens in a pass. A later stage continues from the head
of the stage before it, with more outputs of the target, and predicts more tokens ahead. A new head replaces the
published one if its tokens per pass are at least as many on the same held-out texts. An interrupted run continues where
it stopped.

The stages are those of docs/heads.md. The runs of the target's heads were not kept. Their outputs are assumed to be
those of the programs' default seed, 4000 of them first and 7008 of the same sequence later.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluate import MODELS
from training.head_cards import read_figures
from training.outputs import DEMO_DRAFT, demo_prompts, start_target, write_outputs

MAX_TOKENS, MAX_MODEL_LEN = 512, 4096  # of an output, and of a prompt with its output


@dataclass(frozen=True)
class TrainingStage:
    """One run of a training program."""

    steps: int
    ahead: int
    outputs: int  # outputs of the target: the first ones of one sequence
    rate: float = 4e-3


@dataclass(frozen=True)
class StagedRecipe:
    program: str  # the module in `training`
    stages: tuple[TrainingStage, ...]
    dtype: str  # of the published weights
    target: str = "demo-target"  # the model that the head belongs to

    @property
    def description(self) -> str:
        """The stages in words, for the card."""
        runs = [
            f"{stage.steps} steps, {stage.ahead} tokens ahead, on {stage.outputs} texts that the target generated"
            for stage in self.stages
        ]
        return "; then ".join(runs)


RECIPES: dict[str, StagedRecipe] = {
    "eagle3": StagedRecipe(
        "eagle3",
        (TrainingStage(1500, 7, 4000), TrainingStage(400, 7, 7008, 2e-3), TrainingStage(240, 11, 7008, 1.5e-3)),
        "float32",
    ),
    "parallel": StagedRecipe("parallel", (TrainingStage(1200, 8, 4000), TrainingStage(320, 12, 7008, 2e-3)), "float16"),
    "space": StagedRecipe("space", (TrainingStage(2000, 8, 7008),), "float16"),
    "draft-parallel": StagedRecipe("parallel", (TrainingStage(1500, 16, 7008),), "float16", DEMO_DRAFT),
}


def stage_arguments(name: str, number: int, runs: Path, num_threads: int) -> list[str]:
    """Returns the arguments of the training program for one stage, counted from 0."""
    recipe = RECIPES[name]
    stage = recipe.stages[number]
    last = number == len(recipe.stages) - 1
    arguments = {
        "--target": MODELS / recipe.target,
        "--runs": runs / name / f"stage-{number + 1}",
        "--out": stage_result(name, number, runs),
        "--count": stage.outputs,
        "--steps": stage.steps,
        "--rate": stage.rate,
        "--ahead": stage.ahead,
        "--threads": num_threads,
        "--dtype": recipe.dtype if last else "float32",
        "--trained": recipe.description,
    }
    if number:
        arguments["--start"] = stage_result(name, number - 1, runs)
    return [str(part) for argument in arguments.items() for part in argument]


def stage_result(name: str, number: int, runs: Path) -> Path:
    return runs / name / f"stage-{number + 1}" / f"demo-{name}"


def train_head(name: str, runs: Path, num_threads: int) -> Path:
    """Runs all stages that are not finished, and returns the folder of the last one's head."""
    recipe = RECIPES[name]
    for number, stage in enumerate(recipe.stages):
        result = stage_result(name, number, runs)
        if not (result / "figures.json").exists():  # the training program writes this file last
            outputs = outputs_file(recipe.target, runs)
            copy_outputs(outputs, runs / name / f"stage-{number + 1}" / "outputs.jsonl", stage.outputs)
            arguments = stage_arguments(name, number, runs, num_threads)
            subprocess.run([sys.executable, "-m", f"training.{recipe.program}", *arguments], check=True)
    return stage_result(name, len(recipe.stages) - 1, runs)


def outputs_file(target: str, runs: Path) -> Path:
    return runs / f"{target}.jsonl"


def copy_outputs(source: Path, destination: Path, count: int) -> None:
    """Copies the first outputs to a stage's folder, where its training program looks for them."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    lines = source.read_text().splitlines(keepends=True)[:count]
    destination.write_text("".join(lines))


def publish_if_better(candidate: Path, models: Path, *, force: bool) -> bool:
    """Copies a head into `models` unless the head there yields more tokens per pass."""
    published = models / candidate.name
    if not force and published.exists():
        new, old = (tokens_per_pass(read_figures(folder)) for folder in (candidate, published))
        if new < old:
            print(
                f"kept {published}: it yields {old:.3f} tokens per pass, the new head {new:.3f} (--force replaces it)"
            )
            return False
    temporary = models / f"{candidate.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(candidate, temporary)
    shutil.rmtree(published, ignore_errors=True)
    temporary.rename(published)
    return True


def tokens_per_pass(metrics: Mapping[str, Any]) -> float:
    """Returns the mean over all measured proposals and kinds of text."""
    return statistics.fmean(
        stats["mean_accepted_length"] for options in metrics["ways"].values() for stats in options["of"].values()
    )


def generate_outputs(target: str, path: Path, count: int, num_threads: int) -> None:
    engine = start_target(str(MODELS / target), num_threads, MAX_MODEL_LEN)
    try:
        prompts = demo_prompts(target, engine.model.tokenizer, seed=0)
        write_outputs(engine, prompts, count, path, max_tokens=MAX_TOKENS)
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.demo_heads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=RECIPES, help="train one head")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "heads", help="folder for outputs and stages")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the finished heads")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for arithmetic")
    parser.add_argument("--force", action="store_true", help="replace the published heads even if they are better")
    args = parser.parse_args()
    names = [args.only] if args.only else list(RECIPES)
    for target in sorted({RECIPES[name].target for name in names}):
        recipes = [RECIPES[name] for name in names if RECIPES[name].target == target]
        count = max(stage.outputs for recipe in recipes for stage in recipe.stages)
        generate_outputs(target, outputs_file(target, args.runs), count, args.threads)
    for name in names:
        try:
            head = train_head(name, args.runs, args.threads)
        except subprocess.CalledProcessError as error:
            sys.exit(f"training.{RECIPES[name].program} failed with status {error.returncode}")
        if publish_if_better(head, args.models, force=args.force):
            print(json.dumps({name: tokens_per_pass(read_figures(head))}))


if __name__ == "__main__":
    main()
