"""Checkpoints that cannot be loaded are rejected with one line that says what, where, and what to do."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from parse.demo import DEMO_MODELS
from parse.engines.native import checkpoint
from parse.engines.native.checkpoint import CheckpointError, load_checkpoint, weight_bytes
from parse.engines.native.model import Model
from parse.errors import RequestError

DRAFT = DEMO_MODELS / "demo-draft"
GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch):
    """Simulates two GPUs with 1 GiB free each, of which nothing can be allocated."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 2 * GIB))


def loading(monkeypatch, result):
    def load(*args, **kwargs):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Model.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Model.load(tmp_path)


@pytest.mark.parametrize("device", ["banana", "cuda:99", "balance"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(device):
    with pytest.raises(RequestError, match="device: must be auto or one of cpu.*" + device):
        Model.load("anything", device=device)


def test_a_folder_without_all_the_weights_or_with_others_is_refused(tmp_path):
    folder = shutil.copytree(DEMO_MODELS / "demo-draft", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    for change, why in (
        ({"num_hidden_layers": 3}, "lacks"),
        ({"hidden_size": 48}, r"has the shape .*96.* its config says .*48"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=why):
            Model.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="can be loaded"):
        Model.load(folder)


def test_a_damaged_or_partial_download_is_one_line(tmp_path):
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (weights[: len(weights) // 2], weights[:5], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=f"^{folder} is not a causal language model that can be loaded: .+"
        ) as error:
            load_checkpoint(folder, "cpu", "auto")
        assert "\n" not in str(error.value)


def test_the_size_of_the_weights_is_known_before_they_are_loaded():
    network = AutoModelForCausalLM.from_pretrained(DRAFT)
    expected = sum(parameter.nbytes for parameter in network.parameters())
    assert weight_bytes(network.config, "float32") == expected
    assert weight_bytes(network.config, "bfloat16") == expected // 2


def test_a_model_larger_than_the_memory_is_not_loaded(monkeypatch):
    loading(monkeypatch, AssertionError("it was loaded"))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1000)
    with pytest.raises(CheckpointError, match=r"demo-draft: out of memory: .* need \d+\.\d MiB, and 0\.0 MiB is free"):
        load_checkpoint(DRAFT, "cpu", "auto")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()]
)
def test_a_gpu_that_is_too_small_is_named_with_both_sizes(two_gpus, monkeypatch, error):
    loading(monkeypatch, error)
    with pytest.raises(CheckpointError, match=r"out of memory: .* need \S+ MiB, and 1\.0 GiB is free on cuda:1$"):
        Model.load(DRAFT, device="cuda:1")


def test_a_model_that_would_be_offloaded_to_the_cpu_is_rejected(two_gpus, monkeypatch):
    network = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"})
    loading(monkeypatch, (network, {"missing_keys": [], "mismatched_keys": []}))
    with pytest.raises(CheckpointError, match=r"2\.0 GiB is free on all GPUs.* on the cpu and the disk"):
        Model.load(DRAFT, device="balanced")


@pytest.mark.parametrize(
    ("quantization", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel|autoawq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_a_quantized_checkpoint_names_the_package_that_it_needs(tmp_path, quantization, package):
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=f"^{folder} needs a package that is not installed: .*({package})"):
        load_checkpoint(folder, "cpu", "auto")
