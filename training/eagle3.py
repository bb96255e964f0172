"""Trains an EAGLE-3 head for a target: it predicts several steps from every anchor and learns from each of them.

    python -m training.eagle3 --target models/demo-target                 # the demo pair's head
    python -m training.eagle3 --target some/model --outputs outputs.jsonl --out heads/some
    python -m training.eagle3 --target some/model --prompts prompts.jsonl --out heads/some

Each step uses the head's own prediction of the feature instead of the true one, with the true next token
("training-time test"). Its loss is the cross-entropy with the target's distribution over the head's vocabulary, times
0.8 to the power of the step. Features have no loss of their own. An interrupted run continues where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedConfig, PreTrainedModel

from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import (
    EagleHead,
    EagleHeadConfig,
    RotaryEmbedding,
    TargetModel,
)
from training import heads
from training.head_data import FeatureStore, HeadBatch, batch_indices, most_frequent_tokens, trainable_texts
from training.loop import CosineSchedule, Losses, adamw, train
from training.outputs import TargetOutput
from training.rollouts import rollout_attention, visible_up_to

DECAY = 0.8  # weight of a step's loss relative to the step before


@dataclass(frozen=True)
class HeadRecipe:
    steps: int = 1500
    rate: float = 4e-3
    warmup: int = 50
    texts: int = 8  # in a batch
    ahead: int = 7  # steps of drafting
    draft_vocabulary: int | None = None  # None: all tokens in the target's outputs
    intermediate: int | None = None  # None: the target's
    seed: int = 0
    start: Path | None = None  # a head to continue from, with its sizes and vocabulary
    memory_mb: int = 4096  # memory for features; those beyond it are extracted again

    @property
    def schedule(self) -> CosineSchedule:
        return CosineSchedule(self.steps, self.rate, self.warmup)


def new_head(
    network: PreTrainedModel,
    texts: Sequence[TargetOutput],
    recipe: HeadRecipe,
    *,
    layers: int = 1,
    parallel_tokens: int = 1,
) -> EagleHead:
    """Returns a head with the sizes and the `lm_head` of the target, or the head that the recipe starts from."""
    target, config = TargetModel.of(network), network.config.get_text_config()
    if recipe.start:
        head, embedding_weight = load_head(recipe.start, target)
        if (head.config.parallel_tokens > 1) != (parallel_tokens > 1):
            raise ProposerLoadError(f"{recipe.start} holds a head of another method")
        if not torch.equal(embedding_weight, target.embedding):
            raise ProposerLoadError(f"{recipe.start} brings embeddings of its own, which are not trained here")
        head.config = replace(head.config, parallel_tokens=parallel_tokens)
        return head.float().requires_grad_(True)
    draft_token_ids = most_frequent_tokens(texts, target.vocab_size, recipe.draft_vocabulary)
    torch.manual_seed(recipe.seed)
    # A target with learned positions has no rotary embedding. A head always has one of its own.
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if config.hidden_size != target.hidden_size:
        raise ProposerLoadError(
            f"the target has embeddings of width {target.hidden_size} and hidden states of width {config.hidden_size}, "
            "and a head needs them to be equal"
        )
    head = EagleHead(
        EagleHeadConfig(
            hidden_size=target.hidden_size,
            intermediate_size=recipe.intermediate or _intermediate_size(config),
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or target.hidden_size // config.num_attention_heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(draft_token_ids),
            target_hidden_size=target.hidden_size,
            aux_hidden_state_layers=target.default_aux_layers,
            num_hidden_layers=layers,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
            rope_theta=rope.pop("rope_theta", 10000.0),
            rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
            max_position_embeddings=config.max_position_embeddings,
            parallel_tokens=parallel_tokens,
        )
    )
    head.to_target = draft_token_ids
    output = network.get_output_embeddings().weight
    assert isinstance(output, Tensor)
    with torch.no_grad():
        head.lm_head.copy_(output[draft_token_ids.to(output.device)])
    return head.to(target.embedding.device)


def _intermediate_size(config: PreTrainedConfig) -> int:
    """Returns the width of the target's MLP, which OPT and GPT-2 name differently."""
    sizes = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return next(filter(None, sizes), 4 * config.hidden_size)


class Distillation:
    """Distillation of the target's distribution over the draft vocabulary."""

    def __init__(self, draft_token_ids: Tensor, network: PreTrainedModel) -> None:
        self._lm_head = network.get_output_embeddings()
        self._draft_token_ids = draft_token_ids
        self._in_draft_vocab = torch.zeros(
            TargetModel.of(network).vocab_size, dtype=torch.bool, device=draft_token_ids.device
        )
        self._in_draft_vocab[draft_token_ids] = True

    @torch.no_grad()
    def target_distribution(self, last_hidden_states: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the target's distribution [.., draft vocabulary], and where it counts: where it holds its choice."""
        logits: Tensor = self._lm_head(last_hidden_states).float()
        return logits[..., self._draft_token_ids].softmax(-1), valid & self._in_draft_vocab[logits.argmax(-1)]

    def loss(self, logits: Tensor, last_hidden_states: Tensor, valid: Tensor) -> tuple[Tensor, float]:
        """Returns the mean loss where it counts, and how often the head's choice is the target's."""
        target_probs, counted = self.target_distribution(last_hidden_states, valid)
        weight = counted / counted.sum().clamp(min=1)
        loss = -((target_probs * logits.log_softmax(-1)).sum(-1) * weight).sum()
        agreement = ((logits.argmax(-1) == target_probs.argmax(-1)) * weight).sum()
        return loss, float(agreement) if bool(counted.any()) else float("nan")


def rollout_logits(
    head: EagleHead, embeddings: Tensor, rotation: RotaryEmbedding, batch: HeadBatch
) -> Iterator[Tensor]:
    """Yields the head's logits of each step after all anchors, [B, A, draft vocabulary]."""
    size, width = batch.tokens.shape
    anchors, visible = batch.anchors, visible_up_to(batch.anchors, width)
    keys: list[Tensor] = []  # the text's, then those of each step, [B, A, 1, key heads, d]
    values: list[Tensor] = []

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first = not keys
        keys.append(key if first else key[:, :, None])
        values.append(value if first else value[:, :, None])
        empty = key.new_empty(size, anchors.shape[1], 0, *key.shape[-2:])
        drafted_keys, drafted_values = (torch.cat([empty, *drafted[1:]], 2) for drafted in (keys, values))
        drafted_visible = torch.ones(1, drafted_keys.shape[2], dtype=torch.bool, device=key.device)
        return rollout_attention(
            query[:, :, None], keys[0], values[0], visible, drafted_keys, drafted_values, drafted_visible
        )[:, :, 0]

    batch_index = torch.arange(size, device=anchors.device)[:, None]
    embedded = embedding(batch.tokens, embeddings)
    hidden = head(embedded, head.fuse(batch.features), rotation.cos_sin(range(width)), attend, (batch_index, anchors))
    yield head.logits(hidden)
    for step in range(1, batch.valid.shape[2]):
        embedded = embedding(batch.next_tokens[..., step], embeddings)
        cos, sin = (
            component.view(*anchors.shape, 1, -1) for component in rotation.cos_sin((anchors + step).flatten().tolist())
        )
        hidden = head(embedded, hidden, (cos, sin), attend)
        yield head.logits(hidden)


def head_losses(head: EagleHead, network: PreTrainedModel, features: FeatureStore, recipe: HeadRecipe) -> Losses:
    distillation, embeddings = Distillation(head.to_target, network), TargetModel.of(network).embedding
    rotation = RotaryEmbedding(head.config, head.fc)

    def step_losses(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        batch = features.batch(batch_indices(len(features.texts), recipe.texts, recipe.seed, step), recipe.ahead)
        total, metrics = torch.zeros((), device=head.fc.device), {}
        for offset, logits in enumerate(rollout_logits(head, embeddings, rotation, batch)):
            loss, agreement = distillation.loss(
                logits, batch.last_hidden_states[:, :, offset], batch.valid[..., offset]
            )
            total = total + DECAY**offset * loss
            metrics[f"same {offset + 1}"] = agreement
        yield total, {"loss": total.item(), **metrics}

    return step_losses


def train_head(network: PreTrainedModel, texts: Sequence[TargetOutput], recipe: HeadRecipe, folder: Path) -> EagleHead:
    texts = list(trainable_texts(texts))
    head = new_head(network, texts, recipe)
    features = FeatureStore(network, head.config.aux_hidden_state_layers, texts, recipe.memory_mb)
    train(folder, head, head_losses(head, network, features, recipe), recipe.schedule, build_optimizers=adamw)
    return head.eval()


def main() -> None:
    defaults = HeadRecipe()
    parser = heads.build_parser("eagle3", __doc__, defaults.steps, defaults.rate, defaults.texts, defaults.ahead)
    args = heads.add_size_arguments(parser).parse_args()
    recipe = HeadRecipe(**heads.head_recipe_arguments(args))
    heads.run(args, lambda network, texts, folder: train_head(network, texts, recipe, folder), heads.HEAD_PUBLISHER)


if __name__ == "__main__":
    main()
