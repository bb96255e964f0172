"""The models of a pair: what a configuration file may contain, and what is reported if a model is missing."""

import json
import shutil

import pytest
import yaml

from deployments.config import AppSettings
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_MODELS, DEMO_TARGET
from parse.errors import ModelLoadError, RequestError
from parse.pair import Pair
from parse.pair_settings import SERVICE_SECTIONS, PairSettings, read_pair_settings


def write(path, data):
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_a_file_with_the_sections_of_a_pair_is_read(tmp_path):
    file = write(
        tmp_path / "pair.yaml",
        {"target": {"model": DEMO_TARGET, "num_threads": 1}, "verification": {"stride": 5}},
    )
    settings = read_pair_settings(file)
    assert settings.target == EngineSettings(model=DEMO_TARGET, num_threads=1)
    assert settings.draft is None
    verification = settings.verification_for_target()
    assert verification.stride == 5
    assert verification.prompt == json.loads((DEMO_MODELS / "demo-target" / "parse.json").read_text())["prompt"]


def test_the_configuration_of_the_service_is_read():
    settings = read_pair_settings(DEMO_MODELS.parent / "serve_config.yaml")
    assert settings.target.model == DEMO_TARGET
    assert settings.draft is not None and settings.draft.model == DEMO_DRAFT
    assert settings.target.speculative_configs[0].model == str(DEMO_MODELS / "demo-parallel")


def test_the_service_has_no_further_sections():
    assert set(AppSettings.model_fields) == {*PairSettings.model_fields, *SERVICE_SECTIONS}


def test_relative_paths_refer_to_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "here" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "here" / "pair.yaml", {"target": {"model": "small"}, "draft": {"model": "org/hub-id"}})
    settings = read_pair_settings(file)
    assert settings.target.model == str(tmp_path / "here" / "small")
    assert settings.draft is not None and settings.draft.model == "org/hub-id"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"target": {"model": "m", "threads": 1}}, "target.threads was renamed to target.num_threads"),
        ({"target": {"model": "m"}, "drafts": {}}, "drafts is not known; did you mean draft?"),
        ({"target": {"model": "m"}, "api": {}}, "api is not known"),
        ({"draft": {"model": "m"}}, "target: Field required"),
        ({"applications": []}, "has no args in its first application"),
        ({"applications": [{"name": "parse"}]}, "has no args in its first application"),
        ("[", "cannot be read"),
        ("", "Input should be a valid dictionary"),
    ],
)
def test_errors_in_a_file_name_the_file_and_the_key(tmp_path, data, message):
    file = write(tmp_path / "pair.yaml", data)
    with pytest.raises(RequestError) as rejected:
        Pair.from_config(file)
    assert str(rejected.value).startswith(f"path: {file}") and message in str(rejected.value)
    assert "\n" not in str(rejected.value)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RequestError, match=f"path: {tmp_path}/none.yaml cannot be read"):
        Pair.from_config(tmp_path / "none.yaml")
    for path in (None, 7):
        with pytest.raises(RequestError, match=f"path: must be the path of a YAML file, got {path}"):
            Pair.from_config(path)  # type: ignore[arg-type]


def test_a_folder_without_a_model_is_reported_with_the_argument_and_what_it_lacks(tmp_path):
    with pytest.raises(ModelLoadError) as rejected:
        Pair(DEMO_TARGET, tmp_path)
    assert str(rejected.value) == (
        f"draft: the folder {tmp_path} contains no model; it lacks config.json and weights (model.safetensors) and a "
        "tokenizer (tokenizer.json)"
    )
    assert rejected.value.argument == "draft"


def test_a_head_is_no_target():
    with pytest.raises(ModelLoadError, match=r"target: the folder .*demo-eagle3 .* lacks a tokenizer"):
        Pair(DEMO_MODELS / "demo-eagle3")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "target: must name a model"),
        (7, "target: must be a folder, a Hugging Face id or EngineSettings, got 7"),
        ("/nowhere/at-all", "target: /nowhere/at-all is not a folder"),
        ("./nowhere", "target: ./nowhere is not a folder"),
        (DEMO_TARGET + "/config.json", "target: .*config.json is not a folder"),
    ],
)
def test_a_model_that_is_none_is_reported_with_its_argument(model, message):
    with pytest.raises(ValueError, match=message):
        Pair(model)


def test_an_empty_draft_is_an_error_because_none_means_no_draft():
    with pytest.raises(RequestError, match="draft: must name a model"):
        Pair(DEMO_TARGET, "")


def test_a_broken_model_is_reported_in_one_line(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(DEMO_DRAFT, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelLoadError) as rejected:
        Pair(DEMO_TARGET, folder)
    assert str(rejected.value).startswith("draft: ") and str(folder) in str(rejected.value)
    assert "\n" not in str(rejected.value)


def test_other_settings_are_reported_with_the_argument_that_they_belong_to():
    with pytest.raises(RequestError, match=r"target\.device: must be auto or one of"):
        Pair(EngineSettings(model=DEMO_TARGET, device="cuda:77"))
    with pytest.raises(RequestError, match=r"draft\.kv_cache_memory_bytes: "):
        Pair(DEMO_TARGET, EngineSettings(model=DEMO_DRAFT, kv_cache_memory_bytes=1))


def test_a_model_without_a_chat_template_is_reported(tmp_path):
    for name in ("demo-target", "demo-draft"):
        shutil.copytree(DEMO_MODELS / name, tmp_path / name, ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(ModelLoadError, match=r"target: .*demo-target: the tokenizer has no chat template"):
        Pair(tmp_path / "demo-target")
    with pytest.raises(ModelLoadError, match=r"draft: .*demo-draft: the tokenizer has no chat template"):
        Pair(DEMO_TARGET, tmp_path / "demo-draft")


def test_broken_verification_settings_of_a_target_are_reported(tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(DEMO_TARGET, folder)
    (folder / "parse.json").write_text('{"fool": 1}')
    with pytest.raises(ModelLoadError, match=r"target: .*parse\.json: fool is not known; did you mean full\?"):
        Pair(folder)
