"""Adapters that let a model predict at masks.

They consist of an embedding for masks, and a small network after every layer.

The adapters change the computation only at masks. At all other tokens, the output of the model is bit-for-bit the same
as without the adapters. (In a mixture of experts this holds up to rounding, because the rounding of an expert depends
on the number of tokens that it computes.)
"""

import json
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle_checkpoint import CONFIG, WEIGHTS, copy_tensor, resolve_file
from parse.speculative.proposers.eagle_head import MAX_PARALLEL_TOKENS

MaskIndices = slice | Tensor
"""The entries of a forward pass that are masks."""


@dataclass(frozen=True)
class SpaceAdaptersConfig:
    """The sizes of adapters, with the field names of their config.json."""

    hidden_size: int
    num_hidden_layers: int
    rank: int
    masks: int  # tokens predicted in a pass


class SpaceAdapters(nn.Module):
    """Adds `up[l] silu(down[l] norm(x))` to the output x of layer l, at masks only."""

    def __init__(self, config: SpaceAdaptersConfig) -> None:
        super().__init__()
        self.config = config
        layers, width, rank = config.num_hidden_layers, config.hidden_size, config.rank
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.down = nn.Parameter(torch.randn(layers, rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(layers, width, rank))
        self._mask_indices: MaskIndices | None = None

    @property
    def embedding(self) -> Tensor:
        """The input embedding of a mask, [width]."""
        return self.mask_embedding

    def attach(self, network: PreTrainedModel) -> Self:
        """Registers the adapters as hooks of the network's layers, and returns itself."""
        for number, layer in enumerate(decoder_layers(network)):
            layer.register_forward_hook(self._make_hook(number))
        return self

    @contextmanager
    def at(self, indices: MaskIndices) -> Iterator[None]:
        """Marks the masks of the network's next pass.

        `indices` are entries of [1, T, H]. A slice means that all entries are masks, as in training.
        """
        self._mask_indices = indices
        try:
            yield
        finally:
            self._mask_indices = None

    def _make_hook(self, number: int) -> Any:
        def hook(layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if self._mask_indices is None:
                return output
            hidden = output if isinstance(output, Tensor) else output[0]
            if isinstance(self._mask_indices, slice):
                hidden = hidden + self._delta(number, hidden)
            else:
                delta = self._delta(number, hidden.index_select(-2, self._mask_indices))
                hidden = hidden.index_add(-2, self._mask_indices, delta)
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return hook

    def _delta(self, number: int, hidden: Tensor) -> Tensor:
        normed = rms_norm(hidden, hidden.shape[-1:])
        down, up = (weight[number].to(hidden.device) for weight in (self.down, self.up))
        # NaN must not occur here: masked attention multiplies the values of masks by zero, and zero times NaN is NaN.
        return torch.nan_to_num(silu(normed @ down.T) @ up.T)


def decoder_layers(network: PreTrainedModel) -> Sequence[nn.Module]:
    """Returns the decoder layers of a network.

    They are its first module list whose length is the number of layers.
    """
    count = network.config.get_text_config().num_hidden_layers
    candidates = (m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    layers = next(candidates, None)
    if layers is None:
        raise ProposerLoadError(f"{network.config.model_type}: its {count} decoder layers were not found")
    return list(layers)


def load_adapters(path: str | Path, network: PreTrainedModel) -> SpaceAdapters:
    """Loads adapters for a network, with its device and dtype.

    They are not attached yet.
    """
    embedding = network.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    config_file, file = resolve_file(str(path), CONFIG), resolve_file(str(path), WEIGHTS)
    try:
        config_json = json.loads(Path(config_file).read_text())
        config = SpaceAdaptersConfig(
            **{field.name: operator.index(config_json[field.name]) for field in fields(SpaceAdaptersConfig)}
        )
    except (ValueError, TypeError) as error:
        raise ProposerLoadError(f"{config_file} is damaged: {error}") from error
    except KeyError as error:
        raise ProposerLoadError(f"{config_file} lacks {error}") from error
    for name, target_size in (
        ("hidden_size", embedding.shape[1]),
        ("num_hidden_layers", network.config.get_text_config().num_hidden_layers),
    ):
        if getattr(config, name) != target_size:
            raise ProposerLoadError(
                f"{config_file}: {name} is {getattr(config, name)}, and the target's is {target_size}"
            )
    if not (1 <= config.masks <= MAX_PARALLEL_TOKENS and config.rank >= 1):
        sizes = f"rank {config.rank} and {config.masks} masks"
        raise ProposerLoadError(
            f"{config_file}: rank and masks must be at least 1, and masks at most {MAX_PARALLEL_TOKENS}, got {sizes}"
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ProposerLoadError(f"{file} is damaged or incomplete: {error}") from error
    adapters = SpaceAdapters(config)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            copy_tensor(parameter, name, tensors, file)
    if tensors:
        raise ProposerLoadError(f"{file} has an unexpected tensor {min(tensors)}")
    return adapters.to(embedding.device, embedding.dtype).eval().requires_grad_(False)
