"""What makes a model foresee at masks: an embedding for them, and a small network behind every layer.

At all other tokens the model computes what it did without, bit for bit: whatever is added is added at masks only. (A
mixture of experts up to rounding, as ever when others share its pass: experts round by how many tokens they are given.)
"""

import json
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from parse.speculative.proposers.eagle_checkpoint import CONFIG, WEIGHTS, copy_tensor, file_of
from parse.speculative.proposers.eagle_head import MAX_PARALLEL_TOKENS, ProposerLoadError

ARCHITECTURE = "SpaceAdapters"

MaskIndices = slice | Tensor
"""Which entries of a forward pass are masks."""


@dataclass(frozen=True)
class SpaceAdaptersConfig:
    """Sizes, under the names they have in config.json."""

    hidden_size: int
    num_hidden_layers: int
    rank: int
    masks: int  # tokens foreseen in a pass


class SpaceAdapters(nn.Module):
    """Behind layer l, and at masks only, `up[l] silu(down[l] norm(x))` is added to the stream."""

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
        return self.mask_embedding

    def attach(self, network: PreTrainedModel) -> Self:
        for number, layer in enumerate(decoder_layers(network)):
            layer.register_forward_hook(self._make_hook(number))
        return self

    @contextmanager
    def at(self, indices: MaskIndices) -> Iterator[None]:
        """The network that this is attached to reads masks there, [1, T, H], or with a slice in all of [..., T, H]."""
        self._mask_indices = indices
        try:
            yield
        finally:
            self._mask_indices = None

    def _make_hook(self, number: int) -> Any:
        def hook(layer: nn.Module, given: object, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if self._mask_indices is None:
                return out
            stream = out if isinstance(out, Tensor) else out[0]
            if isinstance(self._mask_indices, slice):
                changed = stream + self._change(number, stream)
            else:
                change = self._change(number, stream.index_select(-2, self._mask_indices))
                changed = stream.index_add(-2, self._mask_indices, change)
            return changed if isinstance(out, Tensor) else (changed, *out[1:])

        return hook

    def _change(self, number: int, stream: Tensor) -> Tensor:
        normed = rms_norm(stream, stream.shape[-1:])
        down, up = (weight[number].to(stream.device) for weight in (self.down, self.up))
        # A number in any case: nobody sees a mask, but what is not seen is multiplied by nought all the same.
        return torch.nan_to_num(silu(normed @ down.T) @ up.T)


def decoder_layers(network: PreTrainedModel) -> Sequence[nn.Module]:
    count = network.config.get_text_config().num_hidden_layers
    found = (m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    layers = next(found, None)
    if layers is None:
        raise ProposerLoadError(f"{network.config.model_type}: its {count} layers were not found")
    return list(layers)


def load_adapters(path: str | Path, network: PreTrainedModel) -> SpaceAdapters:
    """For that network, in its arithmetic and on its device; not yet attached."""
    embedding = network.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    config_file, file = file_of(str(path), CONFIG), file_of(str(path), WEIGHTS)
    try:
        config_json = json.loads(Path(config_file).read_text())
        config = SpaceAdaptersConfig(
            **{field.name: operator.index(config_json[field.name]) for field in fields(SpaceAdaptersConfig)}
        )
    except (ValueError, TypeError) as error:
        raise ProposerLoadError(f"{config_file} is damaged: {error}") from error
    except KeyError as error:
        raise ProposerLoadError(f"{config_file} does not say {error}") from error
    for name, ours in (
        ("hidden_size", embedding.shape[1]),
        ("num_hidden_layers", network.config.get_text_config().num_hidden_layers),
    ):
        if getattr(config, name) != ours:
            raise ProposerLoadError(f"{config_file}: {name} is {getattr(config, name)}, the target's {ours}")
    if not (1 <= config.masks <= MAX_PARALLEL_TOKENS and config.rank >= 1):
        sizes = f"rank {config.rank} and {config.masks} masks"
        raise ProposerLoadError(
            f"{config_file}: rank and masks must be at least 1, masks at most {MAX_PARALLEL_TOKENS}, got {sizes}"
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ProposerLoadError(f"{file} is damaged or half-written: {error}") from error
    adapters = SpaceAdapters(config)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            copy_tensor(parameter, name, tensors, file)
    if tensors:
        raise ProposerLoadError(f"{file} holds {min(tensors)}, which these adapters have no place for")
    return adapters.to(embedding.device, embedding.dtype).eval().requires_grad_(False)


def save_adapters(adapters: SpaceAdapters, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).clone() for name, tensor in adapters.named_parameters()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = {"architectures": [ARCHITECTURE], **asdict(adapters.config), "torch_dtype": str(dtype).split(".")[1]}
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
