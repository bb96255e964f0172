"""Trains the demo pair, stage by stage: the draft model, its drafts, the target, and the comparison with the old pair.

    python -m training.pair            # takes about an hour on two CPU cores; continues an interrupted run
    python -m training.pair --smoke    # runs every stage in a minute; the resulting models know nothing

1. *draft*: two layers learn to answer in a wording of their own. The snapshot with the right accuracy is used; its
   mistakes are those of a model that is not fully trained.
2. *drafts*: the draft model answers problems of its own split. The target learns to recognize real mistakes from them.
3. *base*: five layers learn to answer. A shallow model needs a quarter of the time of a deep one.
4. *recall*: the base learns to keep each token readable at its top layer, for the layers that are added next.
5. *target*: nine more layers on top learn to detect errors and to verify (training/objectives.py).
6. *polish*: all layers are trained on difficult cases.
7. *proof*: the new pair replaces the one in models/ if it is no worse on problems that neither has seen. Its cards show
   figures on other problems, because those of the proof decided which pair is published.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from parse.config import VERIFICATION_FILE
from parse.demo import EXAMPLE_PROMPT
from parse.prefixes import DEFAULT_STRIDE
from training import cards, measure
from training.attention import TREE_ATTENTION
from training.checkpoints import BrokenModel, load_model
from training.evaluate import MODELS, EvaluationPlan, evaluate_pair, load_pair, round_floats
from training.examples import ExampleBuilder, TrainingExample, collate
from training.generation import generate_batch
from training.loop import DamagedCheckpoint, Losses, train
from training.objectives import ErrorDetectionObjective, NextTokenObjective, RecallObjective, VerificationObjective
from training.pair_recipe import BASE_LAYERS, LAYERS, SMOKE, PairRecipe, draft_config, new_model, target_config
from training.task import draw_close_record, draw_problem
from training.tokenizer import VERIFICATION_PROMPT, build_tokenizer
from training.wording import DRAFT, TARGET

MODEL_NAMES = "demo-target", "demo-draft"
NUM_PROBLEMS = 1 << 30  # problems to draw from
DRAFT_FOREIGN = 0.3  # so that the draft can continue the target's words as well
RECALL_MISTAKEN = 0.3
SCRAMBLED_SHARE = 0.15
DRAFT_TEMPERATURE = 0.7  # of the drafts that show other mistakes than the most likely ones

Draft = tuple[int, list[int]]
"""The index of a problem, and the token ids of a draft for it."""


def stage_losses(
    draw_example: Callable[[random.Random], TrainingExample],
    builder: ExampleBuilder,
    objective: NextTokenObjective,
    recipe: PairRecipe,
    name: str,
) -> Losses:
    """Returns the losses of a stage: endless seeded examples, in batches of about `batch_tokens` per step."""

    def losses(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        rng = random.Random(f"{name}/{recipe.seed}/{step}")
        examples, size = [], 0
        while size < recipe.batch_tokens:
            examples.append(draw_example(rng))
            size += examples[-1].num_tokens(builder.verification_suffix)
        # Sorted by length and halved: little is padding.
        examples.sort(key=lambda example: example.num_tokens(builder.verification_suffix))
        parts = [part for part in (examples[: len(examples) // 2], examples[len(examples) // 2 :]) if part]
        for part in parts:
            loss, metrics = objective(
                collate(part, builder.verification_suffix, builder.pad_token_id).to(objective.model.device)
            )
            yield loss / len(parts), metrics

    return losses


def train_draft(recipe: PairRecipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Returns the snapshot whose accuracy is closest to the recipe's. Training ends when a snapshot reaches it."""
    chosen, snapshot_log = folder / "chosen", folder / "snapshots.jsonl"
    if chosen.exists():
        return load_model(chosen)
    builder = ExampleBuilder(tokenizer, own=DRAFT)
    model = new_model(draft_config(tokenizer), recipe.seed)
    objective = NextTokenObjective(model)
    selection = measure.draw_problems(recipe.seed, recipe.selection_problems, split="selection")

    def draw_example(rng: random.Random) -> TrainingExample:
        problem = draw_problem("draft", recipe.seed, rng.randrange(NUM_PROBLEMS))
        return builder.build_synthetic(problem, rng, foreign=DRAFT_FOREIGN, mistaken=0.0, num_prefixes=0)

    def snapshot(step: int) -> bool:
        model.eval()
        accuracy = measure.accuracy(builder, selection, measure.generate_answers(model, builder, selection))
        model.train()
        save(model, tokenizer, folder / f"step-{step}")
        with snapshot_log.open("a") as out:
            out.write(json.dumps({"step": step, "accuracy": accuracy}) + "\n")
        return accuracy >= recipe.snapshot_accuracy

    losses = stage_losses(draw_example, builder, objective, recipe, "draft")
    train(folder, objective, losses, recipe.draft, snapshot=snapshot, snapshot_every=recipe.snapshot_every)
    snapshots = [json.loads(line) for line in snapshot_log.read_text().splitlines()]
    best = min(snapshots, key=lambda snapshot: abs(snapshot["accuracy"] - recipe.snapshot_accuracy))
    print(f"draft: step {best['step']}, {best['accuracy']:.0%} correct on the selection problems")
    shutil.copytree(folder / f"step-{best['step']}", temporary := folder / "chosen.tmp", dirs_exist_ok=True)
    temporary.rename(chosen)
    return load_model(chosen)


def collect_drafts(recipe: PairRecipe, draft: PreTrainedModel, builder: ExampleBuilder, path: Path) -> list[Draft]:
    """Returns drafts for problems of a split of their own, half of them greedy and half sampled."""
    if not path.exists():
        indices = range(recipe.drafted_problems)
        prompts = [builder.prompt(draw_problem("drafts", recipe.seed, index)) for index in indices]
        half = len(prompts) // 2
        torch.manual_seed(recipe.seed)
        answers = generate_batch(draft, builder.tokenizer, prompts[:half])
        answers += generate_batch(draft, builder.tokenizer, prompts[half:], temperature=DRAFT_TEMPERATURE)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(pair) + "\n" for pair in zip(indices, answers, strict=True)))
        temporary.rename(path)
    return [(index, tokens) for index, tokens in map(json.loads, path.read_text().splitlines())]


def train_base(recipe: PairRecipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    builder = ExampleBuilder(tokenizer, own=TARGET)
    model = new_model(target_config(tokenizer, BASE_LAYERS), recipe.seed)
    objective = NextTokenObjective(model)

    def draw_example(rng: random.Random) -> TrainingExample:
        problem = draw_problem("base", recipe.seed, rng.randrange(NUM_PROBLEMS))
        return builder.build_synthetic(problem, rng, foreign=recipe.foreign, mistaken=0.0, num_prefixes=0)

    losses = stage_losses(draw_example, builder, objective, recipe, "base")
    return load_or_train(folder, tokenizer, model, lambda: train(folder, objective, losses, recipe.base))


def train_recall(
    recipe: PairRecipe, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, folder: Path
) -> PreTrainedModel:
    builder = ExampleBuilder(tokenizer, own=TARGET)
    base.set_attn_implementation(TREE_ATTENTION)
    objective = RecallObjective(base)
    nn.Module.to(objective, base.device)

    def draw_example(rng: random.Random) -> TrainingExample:
        problem = draw_problem("recall", recipe.seed, rng.randrange(NUM_PROBLEMS))
        return builder.build_synthetic(problem, rng, foreign=recipe.foreign, mistaken=RECALL_MISTAKEN, num_prefixes=0)

    losses = stage_losses(draw_example, builder, objective, recipe, "recall")
    return load_or_train(folder, tokenizer, base, lambda: train(folder, objective, losses, recipe.recall))


def train_target(
    recipe: PairRecipe,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    drafts: Sequence[Draft],
    folder: Path,
) -> PreTrainedModel:
    builder = ExampleBuilder(tokenizer, own=TARGET)
    model = add_layers(base, target_config(tokenizer), recipe.seed)
    objective = ErrorDetectionObjective(model, builder.verification_suffix, BASE_LAYERS).to(model.device)

    def draw_example(rng: random.Random) -> TrainingExample:
        if rng.random() < recipe.real_drafts:
            index, tokens = rng.choice(drafts)
            return builder.build_from_draft(
                draw_problem("drafts", recipe.seed, index), tokens, rng, recipe.num_prefixes
            )
        problem = draw_problem("target", recipe.seed, rng.randrange(NUM_PROBLEMS))
        if rng.random() < recipe.scrambled:
            return builder.build_scrambled(problem, rng, foreign=recipe.foreign, share=SCRAMBLED_SHARE)
        num_prefixes = recipe.num_prefixes if rng.random() < recipe.verification_share else 0
        return builder.build_synthetic(
            problem, rng, foreign=recipe.foreign, mistaken=recipe.mistaken, num_prefixes=num_prefixes
        )

    losses = stage_losses(draw_example, builder, objective, recipe, "target")
    return load_or_train(folder, tokenizer, model, lambda: train(folder, objective, losses, recipe.target))


def polish(
    recipe: PairRecipe,
    tokenizer: PreTrainedTokenizerBase,
    target: PreTrainedModel,
    drafts: Sequence[Draft],
    folder: Path,
) -> PreTrainedModel:
    """Trains all layers on hard cases: close records, and as many wrong drafts as correct ones."""
    builder = ExampleBuilder(tokenizer, own=TARGET)
    target.set_attn_implementation(TREE_ATTENTION)
    objective = VerificationObjective(target, builder.verification_suffix)
    draft_problems = [draw_problem("drafts", recipe.seed, index) for index, _ in drafts]
    correctness = [
        measure.is_correct(builder, g, tokens) for g, (_, tokens) in zip(draft_problems, drafts, strict=True)
    ]
    indices_by_correctness = [[k for k, r in enumerate(correctness) if r is expected] for expected in (True, False)]

    def draw_example(rng: random.Random) -> TrainingExample:
        if rng.random() < recipe.hard_drafts:
            k = rng.choice(rng.choice([indices for indices in indices_by_correctness if indices]))
            return builder.build_from_draft(draft_problems[k], drafts[k][1], rng, recipe.num_prefixes)
        draw_demo_problem = draw_close_record if rng.random() < recipe.close else draw_problem
        problem = draw_demo_problem("polish", recipe.seed, rng.randrange(NUM_PROBLEMS))
        num_prefixes = recipe.num_prefixes if rng.random() < recipe.verification_share else 0
        return builder.build_synthetic(
            problem, rng, foreign=recipe.foreign, mistaken=recipe.mistaken, num_prefixes=num_prefixes
        )

    losses = stage_losses(draw_example, builder, objective, recipe, "polish")
    before = {name: weight.detach().clone() for name, weight in target.named_parameters()}

    def train_and_average() -> None:
        train(folder, objective, losses, recipe.polish)
        # With the weights after training the target answers worse. The mean of the weights before and after is best
        # at both answering and verifying.
        for name, weight in target.named_parameters():
            weight.data.lerp_(before[name], 0.5)

    return load_or_train(folder, tokenizer, target, train_and_average)


def add_layers(base: PreTrainedModel, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Returns a deeper model that at first behaves like `base`: its layers, with new layers on top.

    The base's weights stay unchanged from here on. The new layers learn to compare tokens with the base's predictions,
    so these must not change. Learning to verify must not make the target's own answers worse either.
    """
    model = new_model(config, seed)
    missing = model.load_state_dict(base.state_dict(), strict=False)
    above = [f"layers.{layer}." for layer in range(BASE_LAYERS, LAYERS)]
    assert not missing.unexpected_keys
    assert all(any(layer in name for layer in above) for name in missing.missing_keys)
    frozen = set(base.state_dict()) - {"model.norm.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model


def load_or_train(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, training: Callable[[], None]
) -> PreTrainedModel:
    """Returns the model of a stage: trained now, or loaded if an earlier run finished it."""
    finished = folder / "finished"
    if not finished.exists():
        training()
        save(model, tokenizer, temporary := folder / "finished.tmp")
        temporary.rename(finished)
    return load_model(finished)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"prompt": VERIFICATION_PROMPT, "self_check_prompts": [EXAMPLE_PROMPT], "stride": DEFAULT_STRIDE}
    (folder / VERIFICATION_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def publish_if_better(recipe: PairRecipe, candidate: Path, models: Path, *, force: bool) -> bool:
    """Copies the candidate pair into `models`, with its cards, unless the pair there is better."""
    new = evaluate_folder(recipe, candidate)
    if not force and any((models / name).exists() for name in MODEL_NAMES):
        try:
            old = evaluate_folder(recipe, models)
        except BrokenModel as error:
            raise BrokenModel(f"{error}; --force replaces the pair in {models}") from error
        if (new_score := quality(new)) < (old_score := quality(old)):
            print(
                f"kept the pair in {models}: its quality is {old_score:.4f}, that of the new one {new_score:.4f} "
                "(--force replaces it)"
            )
            return False
    for name in MODEL_NAMES:
        shutil.rmtree(temporary := models / f"{name}.tmp", ignore_errors=True)
        shutil.copytree(candidate / name, temporary)
    card_plan = EvaluationPlan(recipe.card_problems, recipe.card_seed)
    metrics = round_floats(evaluate_pair(load_pair(candidate), card_plan))
    cards.write_cards(metrics, models / f"{MODEL_NAMES[0]}.tmp", models / f"{MODEL_NAMES[1]}.tmp")
    for name in MODEL_NAMES:
        shutil.rmtree(models / name, ignore_errors=True)
        (models / f"{name}.tmp").rename(models / name)
    return True


def evaluate_folder(recipe: PairRecipe, folder: Path) -> dict[str, Any]:
    return evaluate_pair(load_pair(folder), EvaluationPlan(recipe.proof_problems, recipe.seed, split="proof"))


def quality(metrics: Mapping[str, Any]) -> float:
    """Returns one number to compare pairs by: the mean share of correct results over all kinds of cases."""
    target, verifier = metrics["target"], metrics["verifier"]
    shares = [target["accuracy"], target["continuation_accuracy"], verifier["right_accepted_whole"]]
    shares += [1 - verifier[name] for name in ("wrong_accepted_whole", "kept_past_error") if verifier[name] is not None]
    shares += [verifier["prefix_precision"], verifier["prefix_recall"]]
    defined = [share for share in shares if share is not None]
    return sum(defined) / len(defined)


def train_pair(recipe: PairRecipe, runs: Path, models: Path, *, force: bool) -> bool:
    tokenizer = build_tokenizer()
    draft = train_draft(recipe, tokenizer, runs / "draft")
    drafts = collect_drafts(recipe, draft, ExampleBuilder(tokenizer, own=DRAFT), runs / "drafts.jsonl")
    base = train_base(recipe, tokenizer, runs / "base")
    recall_model = train_recall(recipe, tokenizer, base, runs / "recall")
    verifier_model = train_target(recipe, tokenizer, recall_model, drafts, runs / "target")
    target = polish(recipe, tokenizer, verifier_model, drafts, runs / "polish")
    for name, model in zip(MODEL_NAMES, (target, draft), strict=True):
        save(model, tokenizer, runs / "pair" / name)
    return publish_if_better(recipe, runs / "pair", models, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for stages, checkpoints and logs")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the finished pair")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, batches and weights")
    parser.add_argument("--smoke", action="store_true", help="run all stages in a minute, in a temporary folder")
    parser.add_argument("--force", action="store_true", help="replace the pair in --models even if it is better")
    args = parser.parse_args()
    try:
        if args.smoke:
            with tempfile.TemporaryDirectory() as folder:
                train_pair(replace(SMOKE, seed=args.seed), Path(folder) / "runs", Path(folder) / "models", force=False)
            print("smoke run: every stage works")
        else:
            train_pair(PairRecipe(seed=args.seed), args.runs, args.models, force=args.force)
    except (BrokenModel, DamagedCheckpoint) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
