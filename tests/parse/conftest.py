import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from parse.demo import DEMO_DRAFT

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=200)
settings.load_profile("seeded")


@pytest.fixture(scope="session")
def foreign_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo draft model with another tokenizer: the same vocabulary in another order."""
    folder = tmp_path_factory.mktemp("foreign")
    model = AutoModelForCausalLM.from_pretrained(DEMO_DRAFT)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DRAFT)
    size = len(tokenizer)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))  # old -> new
    embeddings: Any = model.get_input_embeddings().weight
    embeddings.data[order] = embeddings.data.clone()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            if isinstance(old := getattr(config, name, None), int):
                setattr(config, name, int(order[old]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_json["model"]["vocab"] = {word: int(order[k]) for word, k in tokenizer_json["model"]["vocab"].items()}
    for added in tokenizer_json["added_tokens"]:
        added["id"] = int(order[added["id"]])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    return folder
