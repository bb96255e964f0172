import json
import shutil
from dataclasses import replace

import pytest
import torch

from training import pair
from training.checkpoints import BrokenModel, load_model
from training.loop import DamagedCheckpoint, load_checkpoint
from training.pair import train_pair
from training.pair_recipe import SMOKE, new_model, target_config
from training.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Runs the whole recipe with small numbers."""
    folder = tmp_path_factory.mktemp("pair")
    assert train_pair(SMOKE, folder / "runs", folder / "models", force=False)
    return folder


def test_every_stage_leaves_its_checkpoint_and_its_log(run_folder):
    for stage in ("draft", "base", "recall", "target"):
        assert (run_folder / "runs" / stage / "state.pt").is_file()
        rows = [json.loads(line) for line in (run_folder / "runs" / stage / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == getattr(SMOKE, stage).steps
    assert len((run_folder / "runs" / "drafts.jsonl").read_text().splitlines()) == SMOKE.drafted_problems


def test_both_models_come_with_tokenizer_card_and_figures(run_folder):
    for name in ("demo-target", "demo-draft"):
        model_folder = run_folder / "models" / name
        assert load_model(model_folder).config.num_hidden_layers in (2, 14)
        assert {path.name for path in model_folder.iterdir()} >= {
            *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "figures.json")
        }
        assert "{" not in (model_folder / "README.md").read_text()
    assert (run_folder / "models" / "demo-target" / "verifier.svg").read_text().startswith("<?xml")


def test_a_finished_run_is_not_run_again(run_folder, monkeypatch):
    monkeypatch.setattr(pair, "train", lambda *_args, **_kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(pair, "generate_batch", lambda *_args, **_kwargs: pytest.fail("drafted again"))
    train_pair(SMOKE, run_folder / "runs", run_folder / "models", force=False)


def test_the_grown_target_starts_with_the_weights_of_its_base(run_folder, tokenizer):
    base = load_model(run_folder / "runs" / "base" / "finished")
    grown = pair.add_layers(base, target_config(tokenizer), seed=0)
    for name, weight in base.state_dict().items():
        assert (grown.state_dict()[name] == weight).all()


def test_learning_to_verify_does_not_change_the_base(run_folder):
    base = load_model(run_folder / "runs" / "recall" / "finished").state_dict()
    target = load_model(run_folder / "runs" / "target" / "finished").state_dict()
    assert all((target[name] == base[name]).all() for name in base if name != "model.norm.weight")
    above = "model.layers.13.mlp.down_proj.weight"
    assert (target[above] != new_model(target_config(build_tokenizer()), SMOKE.seed).state_dict()[above]).any()


def test_the_polished_target_is_the_mean_of_before_and_after_the_last_stage(run_folder):
    before = load_model(run_folder / "runs" / "target" / "finished").state_dict()
    trained = load_checkpoint(run_folder / "runs" / "polish" / "state.pt")["model"]
    polished = load_model(run_folder / "models" / "demo-target").state_dict()
    for name, weight in polished.items():
        torch.testing.assert_close(weight, (before[name] + trained[f"model.{name}"]) / 2)
    assert any((polished[name] != weight).any() for name, weight in before.items())


def copied_models(run_folder, tmp_path):
    shutil.copytree(run_folder / "models", tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize(("force", "replaced"), [(False, False), (True, True)])
def test_a_better_pair_is_not_overwritten_by_a_worse_one(run_folder, tmp_path, monkeypatch, force, replaced):
    models = copied_models(run_folder, tmp_path)
    before = (models / "demo-target" / "README.md").stat().st_mtime_ns
    qualities = iter([0.5, 0.9])  # of the new pair, of the old one
    monkeypatch.setattr(pair, "quality", lambda _: next(qualities))
    assert pair.publish_if_better(SMOKE, run_folder / "runs" / "pair", models, force=force) is replaced
    assert ((models / "demo-target" / "README.md").stat().st_mtime_ns != before) is replaced


def test_a_damaged_pair_is_named_and_not_replaced(run_folder, tmp_path):
    models = copied_models(run_folder, tmp_path)
    weights = models / "demo-draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BrokenModel, match=r"demo-draft/model\.safetensors is damaged.*--force"):
        pair.publish_if_better(SMOKE, run_folder / "runs" / "pair", models, force=False)


def test_a_run_with_another_recipe_is_not_continued(run_folder, tmp_path):
    shutil.copytree(run_folder / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "target" / "finished")
    longer = replace(SMOKE, target=replace(SMOKE.target, steps=99))
    with pytest.raises(DamagedCheckpoint, match="another schedule"):
        train_pair(longer, tmp_path / "runs", tmp_path / "models", force=False)
