"""Loads models that may be damaged, and names the damaged file in the error."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class BrokenModel(RuntimeError):
    """A model's folder is missing, half-written or damaged."""


def load_model(folder: Path) -> PreTrainedModel:
    _present(folder, "config.json", "model.safetensors")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise BrokenModel(f"{folder / 'model.safetensors'} is damaged or half-written: {error}") from error
    model, report = loaded
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(name):
            raise BrokenModel(
                f"{folder / 'model.safetensors'} does not fit its config: {name} {sorted(report[name])[:5]}"
            )
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    _present(folder, "tokenizer.json", "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise BrokenModel(f"the tokenizer in {folder} is damaged: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _present(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise BrokenModel(f"{folder / name} is missing")
        if name.endswith(".json"):
            try:
                json.loads((folder / name).read_text())
            except ValueError as error:
                raise BrokenModel(f"{folder / name} is damaged: {error}") from error
