"""The examples run, and print what they promise."""

import ast
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse import DEMO_DRAFT, DEMO_TARGET, EngineSettings, Pair
from parse.registry import MODES
from tests.deployments.live import LocalBackend, served
from tests.registrations import temporary_registrations

EXAMPLES = Path(__file__).parents[1] / "examples"
INSTALLED = {"parse", "torch", "openai"}  # what an example may import besides the standard library


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs an example by its name and returns what it prints."""

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        spec = spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        with temporary_registrations():
            module.main()
        return capsys.readouterr().out

    return run_example


def test_the_library_answers_and_streams(run):
    output = run("library")
    assert "Ben" in output.split("\n\n")[0].splitlines()[-2]
    accepted, drafted = map(int, re.findall(r"(\d+) of (\d+) draft tokens were accepted", output)[0])
    assert 0 < accepted < drafted
    events = re.findall(r"^\[(draft|target|rejected)\]", output, re.MULTILINE)
    assert events[:2] == ["draft", "rejected"] and set(events[2:]) == {"target"} and len(events) > 4
    assert "The first text came after" in output.splitlines()[-1]


@pytest.fixture(scope="module")
def url():
    def settings(path):
        return EngineSettings(model=path, num_threads=1, max_model_len=1024, kv_cache_memory_bytes=256 * 2**20)

    with (
        Pair(settings(DEMO_TARGET), settings(DEMO_DRAFT)) as pair,
        served(create_app(LocalBackend(pair.pipeline), ApiSettings(), "demo-target")) as url,
    ):
        yield url


@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_the_openai_client_streams_from_a_service(run, url, mode):
    *answer, last_line = run("openai_client", "--url", url, "--mode", mode).splitlines()
    assert "57" in answer[-1]  # 48 + 7 + 3 - 6 - 3 + 8 + 2 - 2
    assert re.fullmatch(r"\d+ tokens", last_line)


def test_a_prediction_saves_tokens_up_to_its_first_error(run):
    output = run("predicted_outputs")
    (before,) = re.findall(r"without a prediction: (\d+) tokens generated", output)
    ((accepted, generated),) = re.findall(r"with a prediction: (\d+) tokens accepted, (\d+) generated", output)
    assert int(accepted) > int(before) / 2 and 0 < int(generated) < int(before) / 2
    assert "Sam" in output.splitlines()[-3] and "91" in output.splitlines()[-3]


def test_every_mode_answers_the_question(run):
    header, *rows = run("per_request_modes").splitlines()
    assert [row.split()[0] for row in rows] == list(MODES)
    accepted = {row.split()[0]: int(row.split()[1]) for row in rows}
    assert accepted["off"] == 0 and accepted["full"] > 0
    assert all("Ben" in row and "80" in row for row in rows) and header.endswith("last line of the answer")


def test_the_demo_pair_is_the_default_of_your_own_pair(run):
    output = run("your_own_pair")
    assert output.count("P(correct) of the first") > 5
    assert re.search(r"^[1-9]\d* of \d+ draft tokens were accepted", output, re.MULTILINE)


def save_random_model(folder, tokenizer, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_your_own_pair_can_be_two_models_with_different_tokenizers(run, tmp_path):
    from training.tokenizer import build_tokenizer

    target_tokenizer, draft_tokenizer = build_tokenizer(), build_tokenizer()
    draft_tokenizer.add_tokens(["record"])
    assert target_tokenizer.get_vocab() != draft_tokenizer.get_vocab()
    target = save_random_model(tmp_path / "target", target_tokenizer, seed=1)
    draft = save_random_model(tmp_path / "draft", draft_tokenizer, seed=2)
    # Random models know no answer words.
    (tmp_path / "target" / "parse.json").write_text('{"min_answer_mass": 0}')
    output = run("your_own_pair", target, draft, "What is the record?", "--max-tokens", "12")
    assert re.search(r"^P\(correct\) of the first \d+ draft tokens: \d\.\d+$", output, re.MULTILINE)
    assert re.search(r"^\d+ of [1-9]\d* draft tokens were accepted", output, re.MULTILINE)


def test_your_own_pair_reports_a_missing_model_in_one_line(run, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run("your_own_pair", DEMO_TARGET, str(tmp_path))
    assert str(ended.value).startswith(f"your_own_pair.py: draft: the folder {tmp_path} contains no model")


def test_a_custom_acceptance_rule_keeps_more_of_the_draft(run):
    output = run("custom_acceptance_rule")
    accepted = dict(re.findall(r"^(\w+): (\d+) of \d+ draft tokens accepted", output, re.MULTILINE))
    assert list(accepted) == ["first_failure", "tolerate_one_failure"]
    assert 0 < int(accepted["first_failure"]) < int(accepted["tolerate_one_failure"])


def test_a_custom_token_level_method_saves_passes(run):
    output = run("custom_token_level_method")
    counts = re.findall(r"^(\w+): (\d+) tokens in (\d+) passes", output, re.MULTILINE)
    assert [name for name, _, _ in counts] == ["none", "answer_memory", "answer_memory"]
    assert len({tokens for _, tokens, _ in counts}) == 1
    alone, _, second = (int(passes) for _, _, passes in counts)
    assert second < alone / 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_needs_nothing_but_the_installed_package(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            package = module.partition(".")[0]
            assert package in INSTALLED or package in sys.stdlib_module_names, module


def test_the_page_of_the_examples_lists_each_of_them():
    page = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.py\)", page)) == {path.stem for path in EXAMPLES.glob("*.py")}
