"""A Hugging Face causal language model, left as it is: loaded, checked, and run one step at a time."""

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
MAX_SELF_CHECKS = 3  # at most, for the self-check
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}  # of the largest logit, in the self-check


class ModelNotFoundError(ValueError):
    """Not a directory or a hub id with a causal language model."""


class MaskEmbedder(Protocol):
    """What the network reads where a node holds a mask, and how it is changed there."""

    @property
    def embedding(self) -> Tensor:
        """[width]"""
        ...

    def at(self, rows: Tensor) -> AbstractContextManager[None]:
        """For a pass in which these entries are masks."""
        ...


class Model:
    """`forward` runs one packed step; everything else about requests is other modules' business."""

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model", *, int8: bool = False
    ) -> None:
        check_supported(network)
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        self.device: torch.device = next(network.get_input_embeddings().parameters()).device
        self.is_multi_device = any(parameter.device != self.device for parameter in network.parameters())
        # An index serves a tensor on any device.
        self._index_device = torch.device("cpu") if self.is_multi_device else self.device
        config = network.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        optimize_modules(network, linears=not int8)
        self.aux_hidden_state_layers: tuple[int, ...] = ()  # which of the hidden states are wanted beside the logits
        self.mask_embedder: MaskEmbedder | None = None
        self.max_model_len: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.eos_token_ids = _eos_token_ids(network, tokenizer)
        self.bytes_per_token = self._self_check()

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", dtype: Dtype = "auto", int8: bool = False) -> "Model":
        """`path` is a directory or a hub id. On a CPU "auto" computes in float32, elsewhere as the checkpoint says.

        "balanced" spreads the layers evenly over all GPUs.
        """
        resolved_device = _resolve_device(device)
        if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise ModelNotFoundError(f"{path} is no directory")
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
            raise ModelNotFoundError(f"{path} holds no causal language model that can be loaded: {error}") from error
        if missing := sorted(loading_info["missing_keys"]):  # they were filled with random numbers
            raise ModelNotFoundError(f"{path} lacks {len(missing)} of its model's weights, {missing[0]} the first")
        if int8 and resolved_device != "cpu":
            raise UnsupportedModelError("int8 is an option for CPUs; on a GPU load a quantised checkpoint")
        model = cls(network, tokenizer, str(path), int8=int8)
        if int8:  # only after the self-check: its scales follow all that is in a step, so packed and alone differ
            model.network = torch.ao.quantization.quantize_dynamic(model.network, {nn.Linear}, dtype=torch.qint8)
        return model

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], step: StepAttention, logits_entries: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits at the entries in `read` (None: at all), [entries, vocabulary], in float32; and where there are taps,
        the features of all entries, [T, taps * width]."""
        inputs = torch.tensor([tokens, positions], device=self.device)
        keep = (
            0 if logits_entries is None else torch.tensor(logits_entries, dtype=torch.long, device=self._index_device)
        )
        if MASK not in tokens:
            return self.forward_tensors(inputs[:1], inputs[1:], step, keep)
        assert self.mask_embedder is not None, "no masks are known to this model"
        masks = torch.tensor([entry for entry, token in enumerate(tokens) if token == MASK], device=self.device)
        embeddings = self.network.get_input_embeddings()(inputs[:1].clamp(min=0))
        embeddings[:, masks] = self.mask_embedder.embedding
        with self.mask_embedder.at(masks):
            return self.forward_tensors(None, inputs[1:], step, keep, embeddings=embeddings)

    def forward_tensors(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        step: StepAttention,
        keep: Tensor | int,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same of tensors, positions and either tokens [1, T] or embeddings; `keep` is an index, or 0 for all."""
        extra: dict[str, Any] = (
            {"output_hidden_states": list(self.aux_hidden_state_layers)} if self.aux_hidden_state_layers else {}
        )
        out = self.network(
            input_ids=tokens,
            inputs_embeds=embeddings,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            step=step,
            **extra,
        )
        aux_hidden_states = (
            torch.cat([out.hidden_states[tap][0] for tap in self.aux_hidden_state_layers], -1)
            if self.aux_hidden_state_layers
            else None
        )
        logits: Tensor = out.logits[0]
        return logits.float(), aux_hidden_states

    def _self_check(self) -> int:
        """Runs a small tree in packed steps and as separate texts, and compares; returns the cache's bytes a token.

        What the list of refusals does not know shows here: whatever keeps state or masks in a way of its own. It shows
        with every text; whereas rounding may turn a mixture of experts to another one where two are nearly as good.
        """
        for seed in range(MAX_SELF_CHECKS):
            kv_cache = KVCache(num_blocks=2, block_size=BLOCK_SIZE)
            packed, separate = self._packed_and_separate(kv_cache, seed)
            difference, allowed = (
                float((packed - separate).abs().max()),
                TOLERANCE[self.network.dtype] * float(separate.abs().max()),
            )
            if difference <= allowed:
                return kv_cache.num_bytes // (kv_cache.num_blocks * kv_cache.block_size)
        raise UnsupportedModelError(
            f"{self.name} ({self.network.config.model_type}) does not compute the same packed as alone: logits "
            f"differ by {difference:.2g}, {allowed:.2g} is allowed"
        )

    @torch.inference_mode()
    def _packed_and_separate(self, kv_cache: KVCache, seed: int) -> tuple[Tensor, Tensor]:
        """Logits at all nodes of a few probes on a random text, both ways."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocab_size, (14,), generator=generator).tolist()
        text, suffix, prefix_lengths = tokens[:11], tokens[11:], [4, 9, 11]
        sequence = SequenceState(text)
        sequence.block_ids = [1]
        chunks = [
            ScheduledChunk(sequence, suffix_forest(prefix_lengths, suffix), first, last)
            for first, last in ((0, 6), (6, 20))
        ]
        self._set_attention(STEP_ATTENTION)
        make_attention = attention_for(self.device)
        packed = [
            self.forward(span.token_ids(), span.positions(), make_attention(kv_cache, [span]), None)[0]
            for span in chunks
        ]
        self._set_attention("sdpa" if self.network._supports_sdpa else "eager")
        separate = [
            self.network(input_ids=torch.tensor([text[:cut] + suffix], device=self.device), use_cache=False)
            for cut in prefix_lengths
        ]
        self._set_attention(STEP_ATTENTION)
        return torch.cat(packed)[len(text) :], torch.cat([out.logits[0, -len(suffix) :].float() for out in separate])

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
    config = network.config.get_text_config()
    kind = config.model_type
    if network.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind}: an encoder-decoder, not a causal language model")
    if getattr(network, "_is_stateful", False):
        raise UnsupportedModelError(f"{kind}: keeps a recurrent state, which cannot be cut back to a prefix")
    for module, part in network.named_modules():
        label = f"{module.rsplit('.', 1)[-1]} {type(part).__name__}".lower()
        if isinstance(part, nn.Conv1d) or any(word in label for word in RECURRENT):
            raise UnsupportedModelError(
                f"{kind}: has recurrent layers ({module}), which cannot be cut back to a prefix"
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
    """The generation config may name several, the tokenizer only one."""
    generation: Any = getattr(network, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    token_ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*token_ids, tokenizer.eos_token_id) if isinstance(token, int))
