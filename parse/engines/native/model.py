"""Loads, checks and runs an unmodified Hugging Face causal language model."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.engines.native.attention import STEP_ATTENTION, StepAttention, UnsupportedModelError
from parse.engines.native.checkpoint import Dtype, load_checkpoint, resolve_device
from parse.engines.native.kernels import optimize_network
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.paged_attention import BLOCK_SIZE, attention_for
from parse.engines.native.plan_store import ModelPlan, PlanStore
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.rope import max_sequence_length, position_thresholds
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.tree import MASK, suffix_forest

logger = logging.getLogger(__name__)

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention", "dense", "sparse"}
RECURRENT = "linear_attn", "mamba", "recurrent", "short_conv", "rwkv", "time_mix"
MAX_SELF_CHECKS = 3
SELF_CHECK_TOKENS = 14  # of the longer sequence, with its suffix
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}  # of the largest logit, in the self-check

QUANTIZED_TOLERANCE = 0.15  # a small difference may be rounded to another integer


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
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        *,
        plan: ModelPlan | None = None,
    ) -> None:
        """Checks the network. With a plan, its linear layers get the kernels of the plan."""
        check_supported(network)
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        self.device: torch.device = next(network.get_input_embeddings().parameters()).device
        self.is_multi_device = any(parameter.device != self.device for parameter in network.parameters())
        # On several devices, an index on the CPU works for tensors on each of them.
        self._index_device = torch.device("cpu") if self.is_multi_device else self.device
        config = network.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.plan = plan
        optimize_network(network, plan)
        self.aux_hidden_state_layers: tuple[int, ...] = ()  # which hidden states are returned besides the logits
        self.mask_embedder: MaskEmbedder | None = None
        limits = getattr(config, "max_position_embeddings", None), max_sequence_length(config)
        self.max_model_len: int = min((limit for limit in limits if limit), default=1 << 20)
        self.eos_token_ids = _eos_token_ids(network, tokenizer)
        self.bytes_per_token = self._self_check()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        int8: bool = False,
        plans: PlanStore | None = None,
    ) -> "Model":
        """Loads a model from a folder or by its hub id.

        The device "balanced" spreads the layers evenly over all GPUs. Without `plans`, plans are kept in files.
        """
        resolved_device = resolve_device(device)
        network, tokenizer = load_checkpoint(path, resolved_device, dtype)
        if int8 and resolved_device != "cpu":
            raise UnsupportedModelError("int8 works only on CPUs; on a GPU, load a quantized checkpoint")
        plan = ModelPlan.of(network, quantization="int8" if int8 else None, store=plans)
        return cls(network, tokenizer, str(path), plan=plan)

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
        """Checks that packed steps give the same logits as separate sequences.

        The check finds unsupported models that `check_supported` does not know, for example models with their own mask
        or state, or whose computation depends on the other sequences of a step. Such a model fails with every random
        sequence. A mixture of experts may fail with one sequence, if rounding changes the choice between two nearly
        equal experts.

        Returns the bytes per token of the KV cache.
        """
        kv_cache = KVCache(num_blocks=3, block_size=BLOCK_SIZE)
        for start in self._self_check_positions():
            for seed in range(MAX_SELF_CHECKS):
                packed, separate = self._packed_and_separate(kv_cache, seed, start)
                difference = float((packed - separate).abs().max())
                is_quantized = self.plan is not None and self.plan.key.quantization is not None
                tolerance = QUANTIZED_TOLERANCE if is_quantized else TOLERANCE[self.network.dtype]
                allowed = tolerance * float(separate.abs().max())
                if difference <= allowed:
                    break
            else:
                raise UnsupportedModelError(
                    f"{self.name} ({self.network.config.model_type}) does not compute the same in packed steps as "
                    f"alone: at position {start} the logits differ by {difference:.2g}, and {allowed:.2g} is allowed"
                )
        return kv_cache.num_bytes // (kv_cache.num_blocks * kv_cache.block_size)

    def _self_check_positions(self) -> list[int]:
        """Returns the positions where the sequences of the self-check start.

        They start at 0 and shortly before each position where the computation of the model may change.
        """
        last = self.max_model_len - SELF_CHECK_TOKENS
        thresholds = position_thresholds(self.network.config.get_text_config())
        return sorted({0, *(max(0, min(threshold - SELF_CHECK_TOKENS // 2, last)) for threshold in thresholds)})

    @torch.inference_mode()
    def _packed_and_separate(self, kv_cache: KVCache, seed: int, start: int) -> tuple[Tensor, Tensor]:
        """Returns logits from packed and from separate forward passes.

        They are the logits of all nodes of a few suffixes on a random sequence that starts at position `start`, and of
        all tokens of a short sequence. The short sequence starts at position 0 and shares the first packed step.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocab_size, (SELF_CHECK_TOKENS + 5,), generator=generator).tolist()
        prompt, suffix, short, prefix_lengths = tokens[:11], tokens[11:14], tokens[14:], [4, 9, 11]
        sequence, short_sequence = SequenceState(prompt), SequenceState(short)
        sequence.block_ids, short_sequence.block_ids = [1], [2]
        forest = suffix_forest(prefix_lengths, suffix)
        beginning, rest = (ScheduledChunk(sequence, forest, first, end) for first, end in ((0, 6), (6, 20)))
        short_chunk = ScheduledChunk(short_sequence, [], 0, len(short))
        self._set_attention(STEP_ATTENTION)
        make_attention = attention_for(self.device)
        packed = []
        for chunks in ([beginning, short_chunk], [rest]):
            tokens = [token for chunk in chunks for token in chunk.token_ids()]
            offsets = [0 if chunk is short_chunk else start for chunk in chunks]
            positions = [
                offset + position
                for chunk, offset in zip(chunks, offsets, strict=True)
                for position in chunk.positions()
            ]
            packed.append(self.forward(tokens, positions, make_attention(kv_cache, chunks), None)[0])
        self._set_attention("sdpa" if self.network._supports_sdpa else "eager")
        separate = [self._logits_alone(prompt[:length] + suffix, start)[-len(suffix) :] for length in prefix_lengths]
        separate.append(self._logits_alone(short, 0))
        self._set_attention(STEP_ATTENTION)
        suffixes = torch.cat(packed)[len(prompt) + len(short) :]
        return torch.cat([suffixes, packed[0][-len(short) :]]), torch.cat(separate)

    def _logits_alone(self, tokens: list[int], start: int) -> Tensor:
        """Returns the logits [T, vocabulary] of one sequence, computed by the library."""
        input_ids = torch.tensor([tokens], device=self.device)
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        logits: Tensor = self.network(input_ids=input_ids, position_ids=positions, use_cache=False).logits[0]
        return logits.float()

    def _set_attention(self, implementation: str) -> None:
        self.network.set_attn_implementation(implementation)


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
