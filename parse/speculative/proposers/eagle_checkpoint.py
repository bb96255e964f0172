"""Loads checkpoints of heads in the layout of the EAGLE-3 authors.

A checkpoint may also name the first layer `layers.0` instead of `midlayer`.

Our ParallelSpec heads add the tensors `mask_embedding` and `mask_hidden`, `parallel_tokens` in the config, and further
layers as `layers.1` and so on.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle_head import EagleHead, EagleHeadConfig, RotaryEmbedding, TargetModel

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"

# Each parameter of a layer consists of the rows of these tensors of a checkpoint.
LAYER_PARTS = {
    "input_layernorm": ("input_layernorm",),
    "hidden_norm": ("hidden_norm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
PARTS: dict[str, tuple[str, ...]] = {"fc": ("fc.weight",), "norm": ("norm.weight",), "lm_head": ("lm_head.weight",)}
MASKS: dict[str, tuple[str, ...]] = {name: (name,) for name in ("mask_embedding", "mask_hidden")}


def load_head(path: str | Path, target: TargetModel) -> tuple[EagleHead, Tensor]:
    """Loads a head with the device and dtype of its target.

    Returns the head and the embedding of its input tokens.
    """
    folder = str(path)
    config = _load_config(resolve_file(folder, CONFIG), target)
    file, tensors = _load_tensors(folder)
    embedding = tensors.pop("embed_tokens.weight", target.embedding)
    if embedding.shape[1] != config.hidden_size:
        raise ProposerLoadError(
            f"{file}: the target's embeddings have width {embedding.shape[1]}, the head has width "
            f"{config.hidden_size}, and the checkpoint has no embed_tokens.weight"
        )
    head = EagleHead(config)
    midlayer = "midlayer" if any(name.startswith("midlayer.") for name in tensors) else "layers.0"
    with torch.no_grad():
        parameters = dict(head.named_parameters())
        for name, names in checkpoint_layout(config, midlayer).items():
            _fill(parameters[name], names, tensors, file, config)
    head.to_target = _draft_to_target(tensors, config, file)
    if unexpected := sorted(name for name in tensors if not name.endswith("rotary_emb.inv_freq")):
        raise ProposerLoadError(f"{file} has an unexpected tensor {unexpected[0]}")
    like = target.embedding
    return head.to(like.device, like.dtype).eval().requires_grad_(False), embedding.to(like.device, like.dtype)


def checkpoint_layout(config: EagleHeadConfig, midlayer: str) -> dict[str, tuple[str, ...]]:
    """Returns the names of the checkpoint's tensors for each parameter of the head."""
    layout = PARTS | (MASKS if config.parallel_tokens > 1 else {})
    for number in range(config.num_hidden_layers):
        prefix = midlayer if number == 0 else f"layers.{number}"
        for parameter, names in LAYER_PARTS.items():
            if number == 0 or parameter != "hidden_norm":
                layout[f"layers.{number}.{parameter}"] = tuple(f"{prefix}.{name}.weight" for name in names)
    return layout


def row_counts(names: tuple[str, ...], config: EagleHeadConfig) -> list[int]:
    """Returns the number of rows of each of several tensors that form one parameter."""
    keys = config.num_key_value_heads * config.head_dim
    counts = {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": keys, "v_proj": keys}
    return [counts.get(name.split(".")[-2], config.intermediate_size) for name in names]


def _fill(
    parameter: Tensor, names: tuple[str, ...], tensors: dict[str, Tensor], file: str, config: EagleHeadConfig
) -> None:
    parts = parameter.split(row_counts(names, config)) if len(names) > 1 else (parameter,)
    for name, part in zip(names, parts, strict=True):
        copy_tensor(part, name, tensors, file)


def copy_tensor(parameter: Tensor, name: str, tensors: dict[str, Tensor], file: str) -> None:
    """Checks a tensor and moves it from `tensors` into the parameter."""
    if name not in tensors:
        raise ProposerLoadError(f"{file} has no tensor {name}")
    tensor = tensors.pop(name)
    if tensor.shape != parameter.shape:
        raise ProposerLoadError(
            f"{file}: {name} must have the shape {tuple(parameter.shape)} for this target, got {tuple(tensor.shape)}"
        )
    if not tensor.isfinite().all():
        raise ProposerLoadError(f"{file}: {name} has values that are not finite")
    parameter.copy_(tensor)


def _draft_to_target(tensors: dict[str, Tensor], config: EagleHeadConfig, file: str) -> Tensor:
    """Returns the target's id of each draft token, [draft vocabulary].

    It follows from the offsets in d2t. If there is a t2d, it has to mark the same tokens.
    """
    draft_ids, mask = torch.arange(config.draft_vocab_size), tensors.pop("t2d", None)
    offsets = tensors.pop("d2t", None)
    if offsets is None:
        if config.draft_vocab_size != config.vocab_size:
            raise ProposerLoadError(f"{file} has no tensor d2t")
        return draft_ids
    if offsets.shape != draft_ids.shape:
        raise ProposerLoadError(f"{file}: d2t must have the shape {tuple(draft_ids.shape)}, got {tuple(offsets.shape)}")
    target_ids = draft_ids + offsets.long()
    if not (target_ids.min() >= 0 and target_ids.max() < config.vocab_size):
        raise ProposerLoadError(f"{file}: d2t maps to tokens outside 0..{config.vocab_size - 1}")
    if mask is not None:
        if mask.shape != (config.vocab_size,):
            raise ProposerLoadError(f"{file}: t2d must have the shape {(config.vocab_size,)}, got {tuple(mask.shape)}")
        if not torch.equal(mask.bool().nonzero()[:, 0], target_ids.sort().values):
            raise ProposerLoadError(f"{file}: t2d and d2t name different tokens")
    return target_ids


def _load_config(path: str, target: TargetModel) -> EagleHeadConfig:
    try:
        config_json = json.loads(Path(path).read_text())
        config_json = config_json.get("transformer_layer_config", {}) | config_json
    except (ValueError, AttributeError, TypeError) as error:
        raise ProposerLoadError(f"{path} is damaged: {error}") from error
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if config_json.get(name) is None:
            raise ProposerLoadError(f"{path} lacks {name}")
    if config_json.get("norm_before_residual"):
        raise ProposerLoadError(f"{path}: norm_before_residual is not supported")
    if (act := config_json.get("hidden_act", "silu")) != "silu":
        raise ProposerLoadError(f"{path}: hidden_act must be silu, got {act!r}")
    rope = config_json.get("rope_parameters") or {}  # the format since version 5 of transformers
    config_json = {"rope_theta": rope.get("rope_theta"), "rope_scaling": rope or None} | config_json
    values = {
        field.name: config_json[field.name]
        for field in fields(EagleHeadConfig)
        if config_json.get(field.name) is not None
    }
    try:
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("draft_vocab_size", values["vocab_size"])
        values.setdefault("target_hidden_size", target.hidden_size)
        config = EagleHeadConfig(**values | {"aux_hidden_state_layers": _aux_layers(config_json, target)})
        RotaryEmbedding(config, target.embedding).cos_sin([0])
    except ProposerLoadError as error:
        raise ProposerLoadError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ProposerLoadError(f"{path} has an invalid value: {error!r}") from error
    for name, head_size, target_size in (
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
    ):
        if head_size != target_size:
            raise ProposerLoadError(f"{path}: {name} is {head_size}, and the target's is {target_size}")
    if config.draft_vocab_size > config.vocab_size:
        raise ProposerLoadError(
            f"{path}: draft_vocab_size must be at most vocab_size, got {config.draft_vocab_size} and "
            f"{config.vocab_size}"
        )
    return config


def _aux_layers(config_json: Mapping[str, Any], target: TargetModel) -> tuple[int, ...]:
    """Returns the layers that the head reads, as indices into `hidden_states`.

    In `eagle_config`, most published heads name the layers whose *output* they read. These numbers are one less than
    the indices. Other heads use indices, as this project does. If the numbers are the default layers in one of the two
    conventions, that convention applies. Otherwise, numbers in `eagle_config` are interpreted as outputs.
    """
    key = "eagle_aux_hidden_state_layer_ids"
    nested = (config_json.get("eagle_config") or {}).get(key)
    layers = tuple(nested or config_json.get(key) or target.default_aux_layers)
    outputs = tuple(layer - 1 for layer in target.default_aux_layers)
    if layers == outputs or (nested and layers != target.default_aux_layers):
        layers = tuple(layer + 1 for layer in layers)
    if not all(0 <= layer <= target.num_layers for layer in layers):
        raise ProposerLoadError(
            f"auxiliary layers must lie in 0..{target.num_layers} for this target, got {list(layers)}"
        )
    return layers


def _load_tensors(folder: str) -> tuple[str, dict[str, Tensor]]:
    """Returns the path of the weights, and the tensors in it."""
    try:
        file = resolve_file(folder, WEIGHTS)
    except ProposerLoadError:
        try:
            file = resolve_file(folder, PICKLED)
        except ProposerLoadError:
            raise ProposerLoadError(f"{folder} has neither {WEIGHTS} nor {PICKLED}") from None
    try:
        tensors = load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise any exception
        raise ProposerLoadError(f"{file} is damaged or incomplete: {error}") from error
    return file, dict(tensors)


def resolve_file(folder: str, name: str) -> str:
    """Returns the local path of a file.

    The file is in a directory, or in a repository on the Hugging Face Hub.
    """
    try:
        file = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ProposerLoadError(f"{folder} has no checkpoint: {error}") from error
    if file is None:
        raise ProposerLoadError(f"{folder} lacks {name}")
    return file
