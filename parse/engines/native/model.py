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

from parse.engines.native.attention import STEP_ATTENTION, Attention, UnsupportedModel
from parse.engines.native.kernels import speed_up
from parse.engines.native.kv_cache import Memory
from parse.engines.native.paged_attention import PAGE, attention_on
from parse.engines.native.prefix_cache import Context
from parse.engines.native.scheduled_chunk import Span
from parse.tree import MASK, probes
from parse.types import RequestError

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

SERVED_LAYERS = {"full_attention", "sliding_attention", "dense", "sparse"}
RECURRENT = "linear_attn", "mamba", "recurrent", "short_conv", "rwkv", "time_mix"
TEXTS = 3  # at most, for the self-check
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}  # of the largest logit, in the self-check


class ModelNotFound(ValueError):
    """Not a directory or a hub id with a causal language model."""


class Masks(Protocol):
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
        refuse_unsupported(network)
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        self.device: torch.device = next(network.get_input_embeddings().parameters()).device
        self.spread = any(parameter.device != self.device for parameter in network.parameters())
        # An index serves a tensor on any device.
        self._index_device = torch.device("cpu") if self.spread else self.device
        config = network.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        speed_up(network, linears=not int8)
        self.taps: tuple[int, ...] = ()  # which of the hidden states are wanted beside the logits
        self.masks: Masks | None = None
        self.longest: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.ends = _end_tokens(network, tokenizer)
        self.bytes_per_token = self._self_check()

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", dtype: Dtype = "auto", int8: bool = False) -> "Model":
        """`path` is a directory or a hub id. On a CPU "auto" computes in float32, elsewhere as the checkpoint says.

        "balanced" spreads the layers evenly over all GPUs.
        """
        chosen = _device(device)
        if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise ModelNotFound(f"{path} is no directory")
        precision = "float32" if dtype == "auto" and chosen == "cpu" else dtype
        try:
            AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
            load: Any = AutoModelForCausalLM.from_pretrained
            network, found = load(
                path, dtype=precision, device_map=None if chosen == "cpu" else chosen, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelNotFound(f"{path} holds no causal language model that can be loaded: {error}") from error
        if missing := sorted(found["missing_keys"]):  # they were filled with random numbers
            raise ModelNotFound(f"{path} lacks {len(missing)} of its model's weights, {missing[0]} the first")
        if int8 and chosen != "cpu":
            raise UnsupportedModel("int8 is an option for CPUs; on a GPU load a quantised checkpoint")
        model = cls(network, tokenizer, str(path), int8=int8)
        if int8:  # only after the self-check: its scales follow all that is in a step, so packed and alone differ
            model.network = torch.ao.quantization.quantize_dynamic(model.network, {nn.Linear}, dtype=torch.qint8)
        return model

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], step: Attention, read: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits at the entries in `read` (None: at all), [entries, vocabulary], in float32; and where there are taps,
        the features of all entries, [T, taps * width]."""
        rows = torch.tensor([tokens, positions], device=self.device)
        keep = 0 if read is None else torch.tensor(read, dtype=torch.long, device=self._index_device)
        if MASK not in tokens:
            return self.run(rows[:1], rows[1:], step, keep)
        assert self.masks is not None, "no masks are known to this model"
        masks = torch.tensor([entry for entry, token in enumerate(tokens) if token == MASK], device=self.device)
        embedded = self.network.get_input_embeddings()(rows[:1].clamp(min=0))
        embedded[:, masks] = self.masks.embedding
        with self.masks.at(masks):
            return self.run(None, rows[1:], step, keep, embedded=embedded)

    def run(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        step: Attention,
        keep: Tensor | int,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same of tensors, positions and either tokens [1, T] or embeddings; `keep` is an index, or 0 for all."""
        tapped: dict[str, Any] = {"output_hidden_states": list(self.taps)} if self.taps else {}
        out = self.network(
            input_ids=tokens,
            inputs_embeds=embedded,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            step=step,
            **tapped,
        )
        features = torch.cat([out.hidden_states[tap][0] for tap in self.taps], -1) if self.taps else None
        logits: Tensor = out.logits[0]
        return logits.float(), features

    def _self_check(self) -> int:
        """Runs a small tree in packed steps and as separate texts, and compares; returns the cache's bytes a token.

        What the list of refusals does not know shows here: whatever keeps state or masks in a way of its own. It shows
        with every text; whereas rounding may turn a mixture of experts to another one where two are nearly as good.
        """
        for seed in range(TEXTS):
            memory = Memory(pages=2, page_size=PAGE)
            packed, alone = self._packed_and_alone(memory, seed)
            apart, allowed = (
                float((packed - alone).abs().max()),
                TOLERANCE[self.network.dtype] * float(alone.abs().max()),
            )
            if apart <= allowed:
                return memory.bytes // (memory.pages * memory.page_size)
        raise UnsupportedModel(
            f"{self.name} ({self.network.config.model_type}) does not compute the same packed as alone: logits "
            f"differ by {apart:.2g}, {allowed:.2g} is allowed"
        )

    @torch.inference_mode()
    def _packed_and_alone(self, memory: Memory, seed: int) -> tuple[Tensor, Tensor]:
        """Logits at all nodes of a few probes on a random text, both ways."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (14,), generator=draw).tolist()
        text, suffix, cuts = tokens[:11], tokens[11:], [4, 9, 11]
        context = Context(text)
        context.pages = [1]
        spans = [Span(context, probes(cuts, suffix), first, last) for first, last in ((0, 6), (6, 20))]
        self._attend_with(STEP_ATTENTION)
        attend = attention_on(self.device)
        packed = [self.forward(span.tokens(), span.positions(), attend(memory, [span]), None)[0] for span in spans]
        self._attend_with("sdpa" if self.network._supports_sdpa else "eager")
        alone = [
            self.network(input_ids=torch.tensor([text[:cut] + suffix], device=self.device), use_cache=False)
            for cut in cuts
        ]
        self._attend_with(STEP_ATTENTION)
        return torch.cat(packed)[len(text) :], torch.cat([out.logits[0, -len(suffix) :].float() for out in alone])

    def _attend_with(self, implementation: str) -> None:
        self.network.set_attn_implementation(implementation)


def _device(wanted: str) -> str:
    gpus = torch.cuda.device_count()
    here = ["cpu", *(["cuda", "balanced"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if wanted == "auto":
        return "cuda" if gpus else "cpu"
    if wanted not in here:
        raise RequestError("device", f"must be auto or one of {', '.join(here)}, got {wanted!r}")
    return wanted


def refuse_unsupported(network: PreTrainedModel) -> None:
    config = network.config.get_text_config()
    kind = config.model_type
    if network.config.is_encoder_decoder:
        raise UnsupportedModel(f"{kind}: an encoder-decoder, not a causal language model")
    if getattr(network, "_is_stateful", False):
        raise UnsupportedModel(f"{kind}: keeps a recurrent state, which cannot be cut back to a prefix")
    for module, part in network.named_modules():
        label = f"{module.rsplit('.', 1)[-1]} {type(part).__name__}".lower()
        if isinstance(part, nn.Conv1d) or any(word in label for word in RECURRENT):
            raise UnsupportedModel(f"{kind}: has recurrent layers ({module}), which cannot be cut back to a prefix")
        if getattr(part, "sinks", None) is not None:
            raise UnsupportedModel(f"{kind}: attention sinks ({module}) are not supported")
    if strange := sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS):
        raise UnsupportedModel(f"{kind}: layers of type {', '.join(strange)} are not supported")
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            raise UnsupportedModel(f"{kind}: {name} is not supported")
    if not network._supports_attention_backend:
        raise UnsupportedModel(f"{kind}: its attention cannot be replaced")


def _end_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The generation config may name several, the tokenizer only one."""
    generation: Any = getattr(network, "generation_config", None)
    named = getattr(generation, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if isinstance(token, int))
