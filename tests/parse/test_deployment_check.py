"""What is wrong with a deployment is found before anything is loaded, and named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_DRAFT_PARALLEL, DEMO_EAGLE3, DEMO_PARALLEL, DEMO_SPACE, DEMO_TARGET
from parse.deployment_check import check_models
from parse.errors import ModelLoadError

ALL_METHODS = (
    SpeculativeConfig(method="parallel", model=DEMO_PARALLEL),
    SpeculativeConfig(method="eagle3", model=DEMO_EAGLE3),
    SpeculativeConfig(method="space", model=DEMO_SPACE),
    SpeculativeConfig(method="draft_model", model=DEMO_DRAFT),
    SpeculativeConfig(method="ngram"),
)


def check(target, draft=DEMO_DRAFT, methods=()):
    target_settings = EngineSettings(model=str(target), speculative_configs=methods)
    check_models(target_settings, EngineSettings(model=str(draft)) if draft else None, VerificationSettings())


@pytest.fixture
def target(tmp_path):
    return shutil.copytree(DEMO_TARGET, tmp_path / "target")


def other_model(folder, kind="llama", *, vocab_size=510, tokenizer=None):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(DEMO_TARGET)).save_pretrained(folder)
    return folder


def test_the_shipped_models_and_methods_pass():
    check(DEMO_TARGET, DEMO_DRAFT, ALL_METHODS)
    check(DEMO_TARGET, None)


def test_the_methods_of_the_draft_model_are_checked():
    def check_head(head):
        methods = (SpeculativeConfig(method="parallel", model=head),)
        draft = EngineSettings(model=DEMO_DRAFT, speculative_configs=methods)
        check_models(EngineSettings(model=DEMO_TARGET), draft, VerificationSettings())

    check_head(DEMO_DRAFT_PARALLEL)
    with pytest.raises(ModelLoadError, match=r"^draft\.speculative_configs\[0\]: .*auxiliary layers must lie in 0..2"):
        check_head(DEMO_PARALLEL)


def test_models_that_do_not_fit_into_the_memory_together_are_rejected():
    def check_with(draft, memory_bytes):
        draft_settings = EngineSettings(model=DEMO_DRAFT) if draft else None
        check_models(
            EngineSettings(model=DEMO_TARGET), draft_settings, VerificationSettings(), memory_bytes=memory_bytes
        )

    target_bytes, draft_bytes = (
        4 * sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(path).parameters())
        for path in (DEMO_TARGET, DEMO_DRAFT)
    )
    check_with(False, target_bytes)
    check_with(True, target_bytes + draft_bytes)
    for draft, memory_bytes in ((False, target_bytes - 1), (True, target_bytes + draft_bytes - 1)):
        with pytest.raises(
            ModelLoadError, match=r"^target: .*its weights.* need .* MiB, and this machine has .* MiB"
        ) as error:
            check_with(draft, memory_bytes)
        assert ("draft model" in str(error.value)) == draft


def test_no_weights_are_read(target):
    """The weights of a header's length follow it; their values do not matter."""
    file = target / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    check(target)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_a_missing_folder_is_named(tmp_path, name):
    models = {"target": DEMO_TARGET, "draft": DEMO_DRAFT} | {name: tmp_path / "nowhere"}
    with pytest.raises(ModelLoadError, match=f"^{name}: .*nowhere is not a folder"):
        check(**models)


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_a_partial_download_is_named(target, kept):
    file = target / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelLoadError, match=r"^target: .*model\.safetensors is damaged or incomplete") as error:
        check(target)
    assert "\n" not in str(error.value)


def test_files_that_are_not_read_do_not_matter(target):
    (target / "consolidated.safetensors").write_bytes(b"junk")
    check(target)


def test_a_draft_model_with_another_template_needs_one(tmp_path):
    draft = shutil.copytree(DEMO_DRAFT, tmp_path / "draft")
    (draft / "chat_template.jinja").unlink()
    with pytest.raises(ModelLoadError, match=r"^draft: .*the tokenizer has no chat template"):
        check(DEMO_TARGET, draft)


def test_missing_weights_are_named(target):
    tensors = load_file(target / "model.safetensors")
    name = sorted(name for name in tensors if "mlp" in name)[0]
    del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"^target: .* lacks 1 weights of its model; the first one is {name}"):
        check(target)


def test_a_weight_of_another_shape_is_named(target):
    tensors = load_file(target / "model.safetensors")
    name = sorted(name for name in tensors if "mlp" in name)[0]
    shape = tuple(tensors[name].shape)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"^target: .*the weight {name} has the shape") as error:
        check(target)
    assert f"({shape[0] - 1}, {shape[1]}), and its config says {shape}" in str(error.value)


def test_a_damaged_tokenizer_is_named(target):
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"^target: .*its tokenizer cannot be read: ") as error:
        check(target)
    assert "\n" not in str(error.value)


def test_a_damaged_config_is_named(target):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ModelLoadError, match=r"^target: .*num_hidden_layers") as error:
        check(target)
    assert "\n" not in str(error.value)


def test_an_unsupported_model_is_named(tmp_path):
    other_model(tmp_path, "mamba")
    with pytest.raises(ModelLoadError, match=r"^target: .*mamba: the model has a recurrent state"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_a_missing_template_is_named(tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TARGET)
    tokenizer.add_tokens(["another"])  # a draft model with the target's tokenizer needs no template
    tokenizer.chat_template = None
    models = {"target": DEMO_TARGET, "draft": DEMO_DRAFT} | {
        name: other_model(tmp_path / "other", vocab_size=511, tokenizer=tokenizer)
    }
    with pytest.raises(ModelLoadError, match=f"^{name}: .*the tokenizer has no chat template"):
        check(**models)


@pytest.mark.parametrize("method", ["eagle3", "parallel", "space", "draft_model"])
def test_a_part_for_another_target_is_named(tmp_path, method):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TARGET)
    tokenizer.add_tokens(["another"])
    target = other_model(tmp_path, vocab_size=511, tokenizer=tokenizer)
    model = {"eagle3": DEMO_EAGLE3, "parallel": DEMO_PARALLEL, "space": DEMO_SPACE, "draft_model": DEMO_DRAFT}[method]
    with pytest.raises(ModelLoadError, match=r"^target\.speculative_configs\[0\]: .*demo-"):
        check(target, None, (SpeculativeConfig(method=method, model=model),))
