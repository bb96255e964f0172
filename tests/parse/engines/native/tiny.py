"""Small random models, their logits when the library runs them, and helpers to run requests on them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parse.engines.native.engine_core import EngineCore, EngineCoreConfig
from parse.engines.native.generation import Program, TreeInput
from parse.engines.native.model import Model
from parse.engines.native.request import Request
from parse.tree import TokenTree

VOCABULARY = 120
WINDOW = 7

# The weights are large enough that each token a model sees, or does not see, changes its logits.
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_HEADS = dict(head_dim=8)
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)

SERVED: dict[str, dict[str, Any]] = {
    "llama": _HEADS,
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen3_moe": dict(num_experts=4) | _HEADS | _EXPERTS,
    "mistral": dict(sliding_window=WINDOW) | _HEADS,
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2) | _HEADS,
    "glm4": _HEADS,
    "glm4_moe": dict(n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1) | _HEADS | _EXPERTS,
    "gemma3_text": dict(
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_hidden_layers=3,
        query_pre_attn_scalar=8,
    )
    | _HEADS,
    "gemma4_text": dict(
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,  # these layers read keys and values of other layers
        num_global_key_value_heads=1,
        global_head_dim=16,
        attention_k_eq_v=True,
    )
    | _HEADS,
    "phi3": {},
    "olmo2": {},
    "deepseek_v3": dict(
        num_key_value_heads=4,  # its keys and values have different widths and are not shared
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    | _EXPERTS,
    "afmoe": dict(num_experts=4, num_dense_layers=1, sliding_window=WINDOW) | _HEADS | _EXPERTS,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": (dict(num_experts=4) | _HEADS | _EXPERTS, "recurrent"),
    "mamba": ({}, "recurrent"),
    "jamba": (dict(num_experts=2), "recurrent"),
    "recurrent_gemma": (_HEADS, "recurrent"),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), "recurrent"),
    "gpt_oss": (dict(num_local_experts=4) | _HEADS, "sinks"),
    "gemma2": (_HEADS, "softcapping"),
    "nemotron": ({}, "does not pass the keyword arguments of `forward`"),
    "diffllama": (_HEADS, "does not compute the same"),
    "llama4_text": (dict(intermediate_size_mlp=48, num_local_experts=2) | _HEADS, "chunk"),
}


def build(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    changes_of_kind = SERVED[kind] if kind in SERVED else REFUSED[kind][0] if kind in REFUSED else {}
    config = AutoConfig.for_model(kind, **_COMMON | changes_of_kind | changes)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def plain(network: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[T, vocabulary], one sequence in one forward pass of the library."""
    return network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def alone(network: PreTrainedModel, prompt: Sequence[int], tree: TokenTree) -> Tensor:
    """[nodes, vocabulary], each node at the end of a sequence of its own: what its root sees, and the path to it."""
    lengths, visible = tree.visible_context(len(prompt)), tree.visible()
    sequences = [[*prompt[: lengths[node]], *tree.tokens[visible[node]]] for node in range(len(tree))]
    return torch.stack([plain(network, sequence)[-1] for sequence in sequences])


class Response:
    """Collects the logits of a request, and how it ends."""

    request: Request

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.error: BaseException | None = None
        self._ended = threading.Event()

    def on_finished(self, error: BaseException | None) -> None:
        self.error = error
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> "Response":
        assert self._ended.wait(60), "the request does not end"
        return self

    def result(self) -> list[Tensor]:
        if error := self.wait().error:
            raise error
        return self.logits


def submit(engine: EngineCore, tokens: Sequence[int], program: Program, max_new_tokens: int = 0) -> Response:
    response = Response()
    response.request = engine.add_request(Request(list(tokens), program, max_new_tokens, response))
    return response


def run_trees(engine: EngineCore, tokens: Sequence[int], *tree_inputs: TreeInput) -> Response:
    """Runs one tree after another on a context, and collects the logits."""
    response = Response()

    def program() -> Program:
        for tree_input in tree_inputs:
            output = yield tree_input
            assert output.token_ids == output.logits.argmax(-1).tolist()
            response.logits.append(output.logits.clone())

    max_new_tokens = sum(len(each.accepted_path) for each in tree_inputs) + max(len(each.nodes) for each in tree_inputs)
    response.request = engine.add_request(Request(list(tokens), program(), max_new_tokens, response))
    return response


@contextmanager
def paused(engine: EngineCore) -> Iterator[None]:
    """Holds the engine, so that all requests submitted inside share its steps from the first on."""
    go, reached = threading.Event(), threading.Event()

    def hold() -> Program:
        reached.set()
        go.wait(60)
        yield TreeInput((), logits_nodes=())

    response = submit(engine, [], hold())
    assert reached.wait(60)
    try:
        yield
    finally:
        go.set()
        response.result()


@contextmanager
def serving(model: Model, **config: int) -> Iterator[EngineCore]:
    defaults: dict[str, Any] = dict(max_sequences=5, sequence_capacity=128, max_num_seqs=8, max_num_batched_tokens=19)
    engine = EngineCore(model, EngineCoreConfig(**defaults | config))
    try:
        yield engine
    finally:
        engine.shutdown()
