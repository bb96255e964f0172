"""The network of an EAGLE-3 head.

It predicts the token after the next one from the target's hidden states.

Element i combines two vectors. One is the target's hidden states of token i, taken from a few layers and fused. The
other is the embedding of token i + 1. The output is an estimate of the fused vector of token i + 1. `lm_head` maps it
to a distribution over token i + 2. The head can therefore be run on its own output and the token that it drafted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from parse.speculative.proposers.base import ProposerLoadError

# With these types, the frequencies do not depend on the length of the sequence.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

MIN_LAYERS_FOR_AUX = 7  # with fewer layers, two of the default layers of EAGLE-3 are the same or out of order
MAX_PARALLEL_TOKENS = 256  # tokens proposed in one pass; a checkpoint that names more is damaged
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "target_hidden_size",
    "num_hidden_layers",
    "parallel_tokens",
)

Index = slice | Tensor | tuple[Tensor, ...]
"""Selects elements: anything that a tensor can be indexed with."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention: layer, queries [..., Q, heads, d], keys and values [..., T, key heads, d] to [..., Q, heads * d]."""


@dataclass(frozen=True)
class TargetModel:
    """The properties of a target that a head has to match."""

    num_layers: int
    embedding: Tensor  # [vocabulary, H]

    @classmethod
    def of(cls, network: PreTrainedModel) -> Self:
        weight = network.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return cls(network.config.get_text_config().num_hidden_layers, weight.detach())

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    @property
    def default_aux_layers(self) -> tuple[int, ...]:
        """The layers that EAGLE-3 uses by default, as indices into `hidden_states`.

        These are a low, a middle and a high layer. A model of a few layers does not have all three, so its last layers
        are used.
        """
        if self.num_layers < MIN_LAYERS_FOR_AUX:
            return tuple(range(max(1, self.num_layers - 2), self.num_layers + 1))
        return 2, self.num_layers // 2, self.num_layers - 3


@dataclass(frozen=True)
class EagleHeadConfig:
    """The configuration of a head, with the field names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    aux_hidden_state_layers: tuple[int, ...]  # indices into the target's `hidden_states`; k is the input of layer k
    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 2048
    parallel_tokens: int = 1  # tokens proposed in one pass (ParallelSpec)

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ProposerLoadError(f"{name} must be a whole number above 0, got {size!r}")
        if self.parallel_tokens > MAX_PARALLEL_TOKENS:
            raise ProposerLoadError(
                f"parallel_tokens must be at most {MAX_PARALLEL_TOKENS}, got {self.parallel_tokens}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ProposerLoadError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ProposerLoadError(f"head_dim must be even, got {self.head_dim}")
        if self.rope_type not in SUPPORTED_ROPE_TYPES:
            raise ProposerLoadError(
                f"rope_scaling must be one of {', '.join(SUPPORTED_ROPE_TYPES)}, got {self.rope_type!r}"
            )

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    @property
    def fc_input_size(self) -> int:
        return len(self.aux_hidden_state_layers) * self.target_hidden_size


class EagleHead(nn.Module):
    """The network.

    Linear weights are [out, in]. Weights with the same input are stored as one tensor.
    """

    to_target: Tensor  # [draft vocabulary], the target's token id for each token id of the head

    def __init__(self, config: EagleHeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.fc = _init_weight(width, config.fc_input_size)
        self.layers = nn.ModuleList(EagleLayer(config, first=k == 0) for k in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(width))
        self.lm_head = _init_weight(config.draft_vocab_size, width)
        self.register_buffer("to_target", torch.arange(config.draft_vocab_size))
        if config.parallel_tokens > 1:
            self.mask_embedding = nn.Parameter(0.02 * torch.randn(width))
            self.mask_hidden = nn.Parameter(0.02 * torch.randn(width))

    def fuse(self, hidden_states: Tensor) -> Tensor:
        """Fuses the hidden states of several layers: [..., layers * H] to [..., H]."""
        return linear(hidden_states, self.fc)

    def forward(
        self,
        embedded: Tensor,  # [..., T, H], of the tokens
        hidden: Tensor,  # [..., T, H], fused hidden states of the tokens before them, or the head's estimates of those
        rotation: tuple[Tensor, Tensor],  # of their positions, from `RotaryEmbedding`
        attend: Attend,
        keep: Index | None = None,
    ) -> Tensor:
        """Returns estimates of the next fused hidden states.

        `keep` selects the elements. None selects all of them.
        """
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            hidden = layer(
                hidden, embedded if number == 0 else None, rotation, number, attend, keep if number == last else None
            )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits over the draft vocabulary, [..., draft vocabulary]."""
        return linear(rms_norm(hidden, self.norm.shape, self.norm, self.config.rms_norm_eps), self.lm_head)


class EagleLayer(nn.Module):
    """A decoder layer.

    The first layer reads the embedding and the hidden vector concatenated, and adds its output to the hidden vector.
    """

    def __init__(self, config: EagleHeadConfig, *, first: bool) -> None:
        super().__init__()
        self.heads, self.key_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.epsilon = config.rms_norm_eps
        hidden = config.hidden_size
        self.input_layernorm = nn.Parameter(torch.ones(hidden))
        self.hidden_norm = nn.Parameter(torch.ones(hidden)) if first else None
        self.post_attention_layernorm = nn.Parameter(torch.ones(hidden))
        self.qkv = _init_weight((self.heads + 2 * self.key_heads) * self.width, 2 * hidden if first else hidden)
        self.o = _init_weight(hidden, self.heads * self.width)
        self.gate_up = _init_weight(2 * config.intermediate_size, hidden)
        self.down = _init_weight(hidden, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,  # [..., T, H]
        embedded: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        number: int,
        attend: Attend,
        keep: Index | None,
    ) -> Tensor:
        if embedded is None:
            attention_input = self._normed(hidden, self.input_layernorm)
        else:
            assert self.hidden_norm is not None
            normed = self._normed(embedded, self.input_layernorm), self._normed(hidden, self.hidden_norm)
            attention_input = torch.cat(normed, -1)
        # [..., T, heads + 2 key heads, d]: queries, keys, values
        qkv = linear(attention_input, self.qkv).unflatten(-1, (-1, self.width))
        rotated = apply_rotary(qkv[..., : self.heads + self.key_heads, :], rotation)
        query, key = rotated.split((self.heads, self.key_heads), -2)
        if keep is not None:
            query, hidden = query[keep], hidden[keep]
        hidden = hidden + linear(attend(number, query, key, qkv[..., -self.key_heads :, :]), self.o)
        gate_proj, up_proj = linear(self._normed(hidden, self.post_attention_layernorm), self.gate_up).chunk(2, -1)
        return hidden + linear(silu(gate_proj) * up_proj, self.down)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.epsilon)


class RotaryEmbedding:
    """Tables of the cosines and sines of positions.

    The tables grow with the positions that are requested.
    """

    def __init__(self, config: EagleHeadConfig, like: Tensor) -> None:
        self._like = like
        scaling = config.rope_scaling or {}
        width = config.head_dim
        self._scale = 1.0
        if config.rope_type == "default":
            self._frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2).float() / width)
        else:
            llama_config = LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=width,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters={**scaling, "rope_type": config.rope_type, "rope_theta": config.rope_theta},
            )
            self._frequencies, self._scale = ROPE_INIT_FUNCTIONS[config.rope_type](llama_config, torch.device("cpu"))
        self._cos = self._sin = torch.empty(0, 1, width)

    def cos_sin(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of the positions, each [positions, 1, d]."""
        self._extend_tables(max(positions) + 1)
        indices = torch.tensor(positions, device=self._cos.device)
        return self._cos[indices], self._sin[indices]

    def _extend_tables(self, num_positions: int) -> None:
        if num_positions <= len(self._cos):
            return
        size = 1 << max(9, math.ceil(math.log2(num_positions)))
        angles = torch.outer(torch.arange(size).float(), self._frequencies)[:, None]
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        # `apply_rotary` swaps the halves without changing a sign, so the sign is part of the table.
        self._cos, self._sin = (
            torch.cat(halves, -1).to(self._like.device, self._like.dtype) for halves in ((cos, cos), (-sin, sin))
        )


def apply_rotary(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary position embeddings to x, [..., heads, d].

    The halves are paired as in Llama.
    """
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _init_weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))
