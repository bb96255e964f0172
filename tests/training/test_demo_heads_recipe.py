"""The stages of the published heads: what they train, in which order, and when a head is replaced."""

import json
import subprocess

import pytest

from training import demo_heads, eagle3, heads, parallel, space
from training.demo_heads import RECIPES, StagedRecipe, TrainingStage, publish_if_better, stage_arguments, train_head
from training.evaluate import MODELS
from training.head_cards import read_figures

RECIPE_CLASSES = {"eagle3": eagle3.HeadRecipe, "parallel": parallel.ParallelRecipe, "space": space.SpaceRecipe}


def parsed(name, number, runs):
    program = RECIPES[name].program
    defaults = RECIPE_CLASSES[program]()
    parser = heads.build_parser(program, "", defaults.steps, defaults.rate, defaults.texts, defaults.ahead)
    return parser.parse_args(stage_arguments(name, number, runs, num_threads=1))


@pytest.mark.parametrize("name", RECIPES)
def test_the_last_stage_trains_a_head_like_the_published_one(name, tmp_path):
    config = json.loads((MODELS / f"demo-{name}" / "config.json").read_text())
    args = parsed(name, len(RECIPES[name].stages) - 1, tmp_path)
    assert args.dtype == config["torch_dtype"]
    if name != "eagle3":  # an EAGLE-3 head does not store how many steps it was trained for
        assert args.ahead == config["masks" if name == "space" else "parallel_tokens"]
    assert args.trained == read_figures(MODELS / f"demo-{name}")["trained"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_but_the_first_continues_from_the_one_before(name, tmp_path):
    stages = [parsed(name, number, tmp_path) for number in range(len(RECIPES[name].stages))]
    assert stages[0].start is None
    assert [stage.start for stage in stages[1:]] == [stage.out for stage in stages[:-1]]
    assert all(stage.dtype == "float32" for stage in stages[:-1])


def test_finished_stages_are_not_run_again_and_each_gets_its_outputs(tmp_path, monkeypatch):
    started = []

    def fake_run(command, *, check):
        out = command[command.index("--out") + 1]
        started.append(out)
        (tmp_path / out).mkdir(parents=True)
        (tmp_path / out / "figures.json").write_text("{}")

    recipe = StagedRecipe("eagle3", (TrainingStage(2, 3, 1), TrainingStage(1, 3, 2)), "float32", "some-target")
    monkeypatch.setitem(demo_heads.RECIPES, "eagle3", recipe)
    monkeypatch.setattr(subprocess, "run", fake_run)
    (tmp_path / "some-target.jsonl").write_text("a\nb\nc\n")
    head = train_head("eagle3", tmp_path, 1)
    assert len(started) == 2 and started[1] == str(head)
    assert (tmp_path / "eagle3" / "stage-1" / "outputs.jsonl").read_text() == "a\n"
    assert (tmp_path / "eagle3" / "stage-2" / "outputs.jsonl").read_text() == "a\nb\n"
    assert train_head("eagle3", tmp_path, 1) == head and len(started) == 2


@pytest.mark.parametrize(("new", "force", "replaced"), [(7.0, False, True), (6.0, False, False), (6.0, True, True)])
def test_a_worse_head_does_not_replace_the_published_one(tmp_path, new, force, replaced):
    for folder, length in (("models", 6.5), ("runs", new)):
        (tmp_path / folder / "demo-x").mkdir(parents=True)
        figures = {"ways": {"chain": {"of": {"plain": {"mean_accepted_length": length}}}}}
        (tmp_path / folder / "demo-x" / "figures.json").write_text(json.dumps(figures))
    assert publish_if_better(tmp_path / "runs" / "demo-x", tmp_path / "models", force=force) is replaced
    published = read_figures(tmp_path / "models" / "demo-x")["ways"]["chain"]["of"]["plain"]["mean_accepted_length"]
    assert published == (new if replaced else 6.5)
