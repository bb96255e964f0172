"""The settings of the demo pair's recipe, and the configurations of the two models."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from training.attention import TREE_ATTENTION
from training.loop import WarmupStableDecaySchedule

BASE_LAYERS, LAYERS = 5, 14  # of the target, before and after it learns to verify
MAX_MODEL_LEN = 1024  # tokens; the longest question and answer take about 400
# At the usual 0.02, words of a kind drift together before they are told apart, and no copying is learned.
EMBEDDING_SCALE = 0.1


@dataclass(frozen=True)
class PairRecipe:
    """The settings of a run. A smoke run has the same ones with small numbers."""

    seed: int = 0
    batch_tokens: int = 6144
    draft: WarmupStableDecaySchedule = WarmupStableDecaySchedule(steps=3000, rate=8e-3)
    snapshot_every: int = 100
    snapshot_accuracy: float = 0.78
    selection_problems: int = 300
    drafted_problems: int = 24000
    base: WarmupStableDecaySchedule = WarmupStableDecaySchedule(steps=1500, rate=4e-3)
    recall: WarmupStableDecaySchedule = WarmupStableDecaySchedule(steps=350, rate=1.5e-3, embeddings=5e-4, decay=0.8)
    target: WarmupStableDecaySchedule = WarmupStableDecaySchedule(steps=2600, rate=3e-3)
    polish: WarmupStableDecaySchedule = WarmupStableDecaySchedule(steps=500, rate=1e-3, embeddings=2e-4, decay=0.8)
    foreign: float = 0.45  # share of the target's examples that are not in its own wording throughout
    mistaken: float = 0.5
    scrambled: float = 0.35
    real_drafts: float = 0.25
    hard_drafts: float = 0.5  # share of real drafts while polishing
    close: float = 0.6  # share of hard comparisons among the other problems then
    num_prefixes: int = 6
    verification_share: float = 0.6  # share of examples with verification suffixes
    proof_problems: int = 400  # on which a new pair is compared with the published one
    card_problems: int = 3000  # on which the figures of the model cards are measured, as `make evaluate` does
    card_seed: int = 7


SMOKE = PairRecipe(
    batch_tokens=1024,
    draft=WarmupStableDecaySchedule(steps=12, rate=8e-3, warmup=4),
    snapshot_every=6,
    selection_problems=6,
    drafted_problems=12,
    base=WarmupStableDecaySchedule(steps=6, rate=4e-3, warmup=4),
    recall=WarmupStableDecaySchedule(steps=3, rate=4e-3, warmup=1),
    target=WarmupStableDecaySchedule(steps=6, rate=4e-3, warmup=4),
    polish=WarmupStableDecaySchedule(steps=3, rate=1e-3, warmup=1),
    proof_problems=6,
    card_problems=6,
)


def draft_config(tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Returns the draft model's config. OPT has the least overhead: two layers of Llama take a third longer."""
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        word_embed_proj_dim=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        ffn_dim=384,
        max_position_embeddings=MAX_MODEL_LEN,
        dropout=0.0,
        **_ids(tokenizer),
    )


def target_config(tokenizer: PreTrainedTokenizerBase, layers: int = LAYERS) -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=352,
        max_position_embeddings=MAX_MODEL_LEN,
        **_ids(tokenizer),
    )


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return dict(
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
    model.get_input_embeddings().weight.data.normal_(0, EMBEDDING_SCALE)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what writes into the residual stream starts small
            weight.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    assert isinstance(model, PreTrainedModel)
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model
