"""Loads, checks and runs an unmodified Hugging Face causal language model."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parse.engines.native.attention import STEP_ATTENTION, StepAttention, UnsupportedModelError
from parse.engines.native.kernels import optimize_modules
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.paged_attention import BLOCK_SIZE, attention_for
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.errors import RequestError
from parse.tree import MASK, suffix_forest

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention", "dense", "sparse"}
RECURRENT = "linear_attn", "mamba", "recurrent", "short_conv", "rwkv", "time_mix"
MAX_SELF_CHECKS = 3
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}  # of the largest logit, in the self-check


class ModelNotFoundError(ValueError):
    """Raised if a path is neither a folder nor a hub id of a causal language model."""


class MaskEmbedder(Protocol):
    """The input embedding of mask nodes.

    It also changes the network's computation at these nodes.
    """

    @property
    def embedding(self) -> Tensor:
        """The input embedding of a mask, [hidden size]."""
        ...

    def at(self, indices: Tensor) -> AbstractContextManager[None]:
        """Changes the network during a forward pass in which these entries are masks."""
        ...


class Model:
    """A network and its tokenizer; `forward` computes one packed step."""

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model", *, int8: bool = False
    ) -> None:
        check_supported(network)
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        self.device: torch.device = next(network.get_input_embeddings().parameters()).device
        self.is_multi_device = any(parameter.device != self.device for parameter in network.parameters())
        # On several devices, an index on the CPU works for tensors on each of them.
        self._index_device = torch.device("cpu") if self.is_multi_device else self.device
        config = network.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        optimize_modules(network, linears=not int8)
        self.aux_hidden_state_layers: tuple[int, ...] = ()  # which hidden states are returned besides the logits
        self.mask_embedder: MaskEmbedder | None = None
        self.max_model_len: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.eos_token_ids = _eos_token_ids(network, tokenizer)
        self.bytes_per_token = self._self_check()

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", dtype: Dtype = "auto", int8: bool = False) -> "Model":
        """Loads a model from a folder or by its hub id.

        The dtype "auto" means float32 on a CPU and the dtype of the checkpoint elsewhere. The device "balanced" spreads
        the layers evenly over all GPUs.
        """
        resolved_device = _resolve_device(device)
        if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise ModelNotFoundError(f"{path} is not a directory")
        precision = "float32" if dtype == "auto" and resolved_device == "cpu" else dtype
        try:
            AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
            load: Any = AutoModelForCausalLM.from_pretrained
            network, loading_info = load(
                path,
                dtype=precision,
                device_map=None if resolved_device == "cpu" else resolved_device,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelNotFoundError(f"{path} is not a causal language model that can be loaded: {error}") from error
        if missing := sorted(loading_info["missing_keys"]):  # the library has filled them with random numbers
            raise ModelNotFoundError(f"{path} lacks {len(missing)} weights of its model; the first one is {missing[0]}")
        if int8 and resolved_device != "cpu":
            raise UnsupportedModelError("int8 works only on CPUs; on a GPU, load a quantized checkpoint")
        model = cls(network, tokenizer, str(path), int8=int8)
        if int8:  # after the self-check, because its scales depend on all tokens of a step
            model.network = torch.ao.quantization.quantize_dynamic(model.network, {nn.Linear}, dtype=torch.qint8)
        return model

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], step: StepAttention, logits_entries: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes one step; returns logits [entries, vocabulary] in float32.

        The logits are those at `logits_entries`, or at all entries if it is None. If `aux_hidden_state_layers` is set,
        it also returns these hidden states of all entries, [T, layers * hidden size].
        """
        inputs = torch.tensor([tokens, positions], device=self.device)
        entries: Tensor | int = 0
        if logits_entries is not None:
            entries = torch.tensor(logits_entries, dtype=torch.long, device=self._index_device)
        if MASK not in tokens:
            return self.forward_tensors(inputs[:1], inputs[1:], step, entries)
        assert self.mask_embedder is not None, "the model has no mask embedder"
        masks = torch.tensor([entry for entry, token in enumerate(tokens) if token == MASK], device=self.device)
        embeddings = self.network.get_input_embeddings()(inputs[:1].clamp(min=0))
        embeddings[:, masks] = self.mask_embedder.embedding
        with self.mask_embedder.at(masks):
            return self.forward_tensors(None, inputs[1:], step, entries, embeddings=embeddings)

    def forward_tensors(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        step: StepAttention,
        logits_entries: Tensor | int,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes one step from tensors.

        `positions` is [1, T]. Either `tokens`, [1, T], or `embeddings`, [1, T, hidden size], is set.

        `logits_entries` is a tensor of entries, or 0 for all.
        """
        layers = list(self.aux_hidden_state_layers)
        options: dict[str, Any] = {"output_hidden_states": layers} if layers else {}
        out = self.network(
            input_ids=tokens,
            inputs_embeds=embeddings,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=logits_entries,
            step=step,
            **options,
        )
        aux_hidden_states = torch.cat([out.hidden_states[layer][0] for layer in layers], -1) if layers else None
        logits: Tensor = out.logits[0]
        return logits.float(), aux_hidden_states

    def _self_check(self) -> int:
        """Checks that packed steps compute the same as separate sequences.

        Returns the bytes per token of the KV cache.

        This finds unsupported models that `check_supported` does not know, for example models with their own mask or
        state. Such a model fails with every random sequence. A mixture of experts may fail with one sequence, if
        rounding changes the choice between two nearly equal experts.
        """
        for seed in range(MAX_SELF_CHECKS):
            kv_cache = KVCache(num_blocks=2, block_size=BLOCK_SIZE)
            packed, separate = self._packed_and_separate(kv_cache, seed)
            difference = float((packed - separate).abs().max())
            allowed = TOLERANCE[self.network.dtype] * float(separate.abs().max())
            if difference <= allowed:
                return kv_cache.num_bytes // (kv_cache.num_blocks * kv_cache.block_size)
        raise UnsupportedModelError(
            f"{self.name} ({self.network.config.model_type}) does not compute the same in packed steps as alone: the "
            f"logits differ by {difference:.2g}, and {allowed:.2g} is allowed"
        )

    @torch.inference_mode()
    def _packed_and_separate(self, kv_cache: KVCache, seed: int) -> tuple[Tensor, Tensor]:
        """Returns logits from packed and from separate forward passes.

        They belong to all nodes of a few suffixes on a random sequence.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocab_size, (14,), generator=generator).tolist()
        prompt, suffix, prefix_lengths = tokens[:11], tokens[11:], [4, 9, 11]
        sequence = SequenceState(prompt)
        sequence.block_ids = [1]
        chunks = [
            ScheduledChunk(sequence, suffix_forest(prefix_lengths, suffix), start, end)
            for start, end in ((0, 6), (6, 20))
        ]
        self._set_attention(STEP_ATTENTION)
        make_attention = attention_for(self.device)
        packed = [
            self.forward(chunk.token_ids(), chunk.positions(), make_attention(kv_cache, [chunk]), None)[0]
            for chunk in chunks
        ]
        self._set_attention("sdpa" if self.network._supports_sdpa else "eager")
        separate = [
            self.network(input_ids=torch.tensor([prompt[:length] + suffix], device=self.device), use_cache=False)
            for length in prefix_lengths
        ]
        self._set_attention(STEP_ATTENTION)
        return torch.cat(packed)[len(prompt) :], torch.cat([out.logits[0, -len(suffix) :].float() for out in separate])

    def _set_attention(self, implementation: str) -> None:
        self.network.set_attn_implementation(implementation)


def _resolve_device(device: str) -> str:
    gpus = torch.cuda.device_count()
    available = ["cpu", *(["cuda", "balanced"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device not in available:
        raise RequestError("device", f"must be auto or one of {', '.join(available)}, got {device!r}")
    return device


def check_supported(network: PreTrainedModel) -> None:
    """Raises `UnsupportedModelError` for a model that is known to be unsupported.

    The engine would compute such a model incorrectly.
    """
    config = network.config.get_text_config()
    kind = config.model_type
    if network.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind}: this is an encoder-decoder model, not a causal language model")
    if getattr(network, "_is_stateful", False):
        raise UnsupportedModelError(f"{kind}: the model has a recurrent state, which cannot be truncated to a prefix")
    for module, part in network.named_modules():
        label = f"{module.rsplit('.', 1)[-1]} {type(part).__name__}".lower()
        if isinstance(part, nn.Conv1d) or any(word in label for word in RECURRENT):
            raise UnsupportedModelError(
                f"{kind}: the model has recurrent layers ({module}), whose state cannot be truncated to a prefix"
            )
        if getattr(part, "sinks", None) is not None:
            raise UnsupportedModelError(f"{kind}: attention sinks ({module}) are not supported")
    if unsupported := sorted(set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES):
        raise UnsupportedModelError(f"{kind}: layers of type {', '.join(unsupported)} are not supported")
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"{kind}: {name} is not supported")
    if not network._supports_attention_backend:
        raise UnsupportedModelError(f"{kind}: its attention cannot be replaced")


def _eos_token_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the end tokens of a model.

    These are the end tokens of the generation config, which may name several, and that of the tokenizer.
    """
    generation: Any = getattr(network, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    token_ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*token_ids, tokenizer.eos_token_id) if isinstance(token, int))
