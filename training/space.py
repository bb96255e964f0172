"""Trains the adapters of SPACE, with which a target predicts further tokens at masks. They act at masks only.

    python -m training.space --target models/demo-target                 # the demo pair's adapters
    python -m training.space --target some/model --outputs outputs.jsonl --out adapters/some

Several masks follow every anchor. Mask s learns what the target generates s tokens after its next one. It sees the
text up to the anchor and the masks before it in its group. The target itself is frozen: its keys and values of the text
are computed once, and the gradients pass through its layers. An interrupted run continues where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from parse.speculative.proposal import chain_proposal
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.space_adapters import SpaceAdapters, SpaceAdaptersConfig, load_adapters
from training import heads
from training.acceptance import (
    AcceptanceStats,
    acceptance_metrics,
    acceptance_rates,
    count_accepted,
    group_by_kind,
)
from training.eagle3 import Distillation
from training.head_checkpoints import save_adapters
from training.head_data import HeadBatch, HeadFeatures, batch_indices, collate_features, sample_anchors, trainable_texts
from training.loop import CosineSchedule, Losses, adamw, train
from training.objectives import bfloat16_is_faster
from training.outputs import TargetOutput
from training.rollouts import rollout_attention, visible_up_to

DECAY = 0.9  # weight of a mask's loss relative to the mask before
GROUP_ATTENTION = "mask_groups"


@dataclass(frozen=True)
class SpaceRecipe:
    steps: int = 2000
    rate: float = 4e-3
    warmup: int = 50
    texts: int = 8  # in a batch
    ahead: int = 8  # masks after an anchor
    rank: int = 64
    share: float = 0.35  # of the anchors used in a batch, because masks are most of the work and texts are used again
    seed: int = 0
    start: Path | None = None  # adapters to continue from, with their sizes

    @property
    def schedule(self) -> CosineSchedule:
        return CosineSchedule(self.steps, self.rate, self.warmup)


@dataclass(frozen=True)
class MaskGroups:
    """What the masks see: the text up to their anchor, and the masks before them in their own group."""

    past_key_values: DynamicCache
    visible: Tensor  # [B, A, T] bool

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attends from [B, heads, A * S, d] query, key and value, and returns [B, A * S, heads, d]."""
        anchors = self.visible.shape[1]
        grouped = (states.transpose(1, 2).unflatten(1, (anchors, -1)) for states in (query, key, value))
        query, key, value = grouped
        size, masks, width = len(query), query.shape[2], query.shape[-1]
        past_layer = self.past_key_values.layers[layer]
        assert isinstance(past_layer, CacheLayerMixin) and past_layer.keys is not None and past_layer.values is not None
        causal = torch.ones(masks, masks, dtype=torch.bool, device=query.device).tril()
        query = query * (scale * width**0.5)  # the rollout's attention scales by the width
        text_keys, text_values = (states.transpose(1, 2) for states in (past_layer.keys, past_layer.values))
        out = rollout_attention(query, text_keys, text_values, self.visible, key, value, causal)
        return out.reshape(size, anchors * masks, -1, width)


def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    groups: MaskGroups | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    if groups is None:  # a text never sees the padding after it, so no mask is needed
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    number = module.layer_idx
    assert isinstance(number, int)
    return groups.attend(number, query, key, value, scaling), None


AttentionInterface.register(GROUP_ATTENTION, group_attention)


def mask_batch(
    network: PreTrainedModel, texts: Sequence[TargetOutput], num_masks: int, *, share: float = 1.0, seed: int = 0
) -> tuple[HeadBatch, MaskGroups]:
    """Mask s of an anchor learns the target's distribution s tokens after the anchor's next token."""
    network.set_attn_implementation(GROUP_ATTENTION)
    width = max(len(text.tokens) for text in texts)
    input_ids = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in texts], device=network.device)
    past_key_values = DynamicCache(config=network.config)
    with torch.no_grad():
        out = network(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=1,
        )
    features = []
    for text, last_hidden_states in zip(texts, out.hidden_states[-1], strict=True):
        first_anchor = max(0, len(text.prompt) + text.begun - 2)
        features.append(
            HeadFeatures(
                last_hidden_states.new_empty(len(text.tokens) - 1, 0),
                last_hidden_states[first_anchor + 1 : len(text.tokens)].float(),
                first_anchor,
            )
        )
    sampled = sample_anchors(collate_features(texts, features, num_masks + 1), share, seed)
    return sampled, MaskGroups(past_key_values, visible_up_to(sampled.anchors + 1, width))


def mask_logits(
    adapters: SpaceAdapters, network: PreTrainedModel, mask_anchors: HeadBatch, groups: MaskGroups
) -> Tensor:
    """Returns the target's logits at all masks of all anchors, [B, A, S, vocabulary]."""
    size, anchors, masks = *mask_anchors.anchors.shape, mask_anchors.valid.shape[2] - 1
    positions = mask_anchors.anchors[..., None] + 2 + torch.arange(masks, device=mask_anchors.anchors.device)
    embedded = adapters.mask_embedding.expand(size, anchors * masks, -1)
    with adapters.at(slice(None)):
        out = network(inputs_embeds=embedded, position_ids=positions.flatten(1), use_cache=False, groups=groups)
    logits: Tensor = out.logits.float()
    return logits.unflatten(1, (anchors, masks))


def adapter_losses(
    adapters: SpaceAdapters, network: PreTrainedModel, texts: Sequence[TargetOutput], recipe: SpaceRecipe
) -> Losses:
    device = network.device
    distillation = Distillation(torch.arange(network.config.get_text_config().vocab_size, device=device), network)
    use_bfloat16 = bfloat16_is_faster(device.type)

    def step_losses(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        step_texts = [texts[k] for k in batch_indices(len(texts), recipe.texts, recipe.seed, step)]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bfloat16):
            seed = 1_000_003 * recipe.seed + step
            mask_anchors, groups = mask_batch(network, step_texts, recipe.ahead, share=recipe.share, seed=seed)
            logits = mask_logits(adapters, network, mask_anchors, groups)
        total, metrics = torch.zeros((), device=device), {}
        for mask in range(recipe.ahead):
            loss, agreement = distillation.loss(
                logits[:, :, mask], mask_anchors.last_hidden_states[:, :, mask + 1], mask_anchors.valid[..., mask + 1]
            )
            total = total + DECAY**mask * loss
            metrics[f"same {mask + 1}"] = agreement
        yield total, {"loss": total.item(), **metrics}

    return step_losses


def measure_acceptance(
    adapters: SpaceAdapters, network: PreTrainedModel, texts: Sequence[TargetOutput]
) -> AcceptanceStats:
    """Measures how many candidates are accepted, with a group of masks after every candidate."""
    lengths: list[int] = []
    tokens_by_text: list[int] = []
    passes_by_text: list[int] = []
    proposed = 0
    with torch.inference_mode():
        for text in texts:
            mask_anchors, groups = mask_batch(network, [text], adapters.config.masks)
            guesses = mask_logits(adapters, network, mask_anchors, groups).argmax(-1)[0].tolist()
            # The masks after token t predict the tokens from t + 2 on.
            candidates_after = dict(zip((mask_anchors.anchors[0] + 1).tolist(), guesses, strict=True))
            position = len(text.prompt) + text.begun
            tokens_by_text.append(len(text.tokens) - position)
            passes_by_text.append(0)
            candidates: list[int] = []
            while position < len(text.tokens):
                proposal = chain_proposal(candidates)
                lengths.append(count_accepted(proposal, text.tokens[position:]))
                proposed += len(candidates)
                last_accepted = position + lengths[-1] - 1
                position = min(last_accepted + 2, len(text.tokens))
                candidates = candidates_after.get(last_accepted, [])
                passes_by_text[-1] += 1
    return AcceptanceStats(
        tuple(tokens_by_text), tuple(passes_by_text), acceptance_rates(lengths), proposed / max(1, len(lengths)), 0.0
    )


def evaluate_adapters(path: Path, network: PreTrainedModel, texts: Sequence[TargetOutput]) -> dict[str, Any]:
    adapters = load_adapters(path, network).attach(network)
    acceptance_by_kind = {
        kind: acceptance_metrics(measure_acceptance(adapters, network, kind_texts))
        for kind, kind_texts in group_by_kind(texts).items()
    }
    return {"texts": len(texts), "ways": {"chain": {"most": adapters.config.masks, "of": acceptance_by_kind}}}


def new_adapters(network: PreTrainedModel, recipe: SpaceRecipe) -> SpaceAdapters:
    config = network.config.get_text_config()
    if recipe.start:
        adapters = load_adapters(recipe.start, network).float().requires_grad_(True)
        if adapters.config.masks != recipe.ahead:
            raise ProposerLoadError(f"{recipe.start} was trained for {adapters.config.masks} masks, not {recipe.ahead}")
        return adapters
    torch.manual_seed(recipe.seed)
    return SpaceAdapters(
        SpaceAdaptersConfig(config.hidden_size, config.num_hidden_layers, recipe.rank, recipe.ahead)
    ).to(network.device)


def train_adapters(
    network: PreTrainedModel, texts: Sequence[TargetOutput], recipe: SpaceRecipe, folder: Path
) -> SpaceAdapters:
    network.requires_grad_(False)
    adapters = new_adapters(network, recipe).attach(network)
    train(
        folder,
        adapters,
        adapter_losses(adapters, network, list(trainable_texts(texts)), recipe),
        recipe.schedule,
        build_optimizers=adamw,
    )
    return adapters.eval()


def main() -> None:
    defaults = SpaceRecipe()
    parser = heads.build_parser("space", __doc__, defaults.steps, defaults.rate, defaults.texts, defaults.ahead)
    parser.add_argument("--rank", type=int, default=defaults.rank, help="rank of the adapters")
    args = parser.parse_args()
    recipe = SpaceRecipe(**heads.recipe_arguments(args), rank=args.rank)
    publisher = heads.Publisher[SpaceAdapters](
        lambda adapters, folder, dtype: save_adapters(adapters, folder, dtype=dtype),
        evaluate_adapters,
    )
    heads.run(args, lambda network, texts, folder: train_adapters(network, texts, recipe, folder), publisher)


if __name__ == "__main__":
    main()
