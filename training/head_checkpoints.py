"""Writes trained heads and adapters to disk, as `parse.speculative` loads them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from parse.speculative.proposers.eagle_checkpoint import CONFIG, WEIGHTS, checkpoint_layout, row_counts
from parse.speculative.proposers.eagle_head import EagleHead
from parse.speculative.proposers.space_adapters import SpaceAdapters

EAGLE_ARCHITECTURE = "LlamaForCausalLMEagle3"
SPACE_ARCHITECTURE = "SpaceAdapters"


def save_head(head: EagleHead, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a head in the layout of EAGLE-3's authors.

    `eagle_aux_hidden_state_layer_ids` holds indices into `hidden_states`.
    """
    config = head.config
    parameters = dict(head.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, part_names in checkpoint_layout(config, "midlayer").items():
        parameter = parameters[name].detach()
        parts = parameter.split(row_counts(part_names, config)) if len(part_names) > 1 else [parameter]
        tensors |= {part: tensor.to("cpu", dtype).clone() for part, tensor in zip(part_names, parts, strict=True)}
    if config.draft_vocab_size != config.vocab_size:
        draft_token_ids = head.to_target.cpu()
        tensors["d2t"] = draft_token_ids - torch.arange(len(draft_token_ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, draft_token_ids, True)
    config_json = asdict(config)
    aux_layers = config_json.pop("aux_hidden_state_layers")
    if config.parallel_tokens == 1:
        del config_json["parallel_tokens"]
    config_json |= {
        "architectures": [EAGLE_ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": _dtype_name(dtype),
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(aux_layers),
    }
    _write_checkpoint(folder, tensors, config_json)


def save_adapters(adapters: SpaceAdapters, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the adapters of SPACE."""
    tensors = {name: tensor.detach().to("cpu", dtype).clone() for name, tensor in adapters.named_parameters()}
    config_json = {
        "architectures": [SPACE_ARCHITECTURE],
        **asdict(adapters.config),
        "torch_dtype": _dtype_name(dtype),
    }
    _write_checkpoint(folder, tensors, config_json)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_checkpoint(folder: Path, tensors: dict[str, Tensor], config_json: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config_json, indent=2) + "\n")
