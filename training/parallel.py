"""Trains a ParallelSpec head for a target: from every anchor, several masks predict as many tokens at once.

    python -m training.parallel --target models/demo-target                 # the demo pair's head
    python -m training.parallel --target some/model --outputs outputs.jsonl --out heads/some

The masks of an anchor see the text up to it and the masks before them, and nothing else sees them. So all anchors of a
text are trained in one pass. Each position learns the target's distribution over the head's vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from parse.speculative.proposers.eagle_head import EagleHead, RotaryEmbedding, TargetModel
from training import heads
from training.eagle3 import Distillation, HeadRecipe, new_head
from training.head_data import FeatureStore, HeadBatch, batch_indices, sample_anchors, trainable_texts
from training.loop import Losses, adamw, train
from training.outputs import TargetOutput
from training.rollouts import rollout_attention, visible_up_to

DECAY = 0.8  # weight of a position's loss relative to the one before


@dataclass(frozen=True)
class ParallelRecipe(HeadRecipe):
    steps: int = 1200
    rate: float = 4e-3
    texts: int = 8
    ahead: int = 8  # tokens proposed in a pass
    layers: int = 2
    share: float = 0.5  # of the anchors used in a batch, because masks take most of the time and texts are used again


def parallel_logits(head: EagleHead, embeddings: Tensor, rotation: RotaryEmbedding, batch: HeadBatch) -> Tensor:
    """Returns the head's logits at all positions after all anchors, [B, A, S, draft vocabulary]."""
    size, width = batch.tokens.shape
    anchors, last_layer = batch.anchors, len(head.layers) - 1
    masks = batch.valid.shape[2] - 1
    device = anchors.device
    visible, visible_text = (
        visible_up_to(anchors, width),
        visible_up_to(torch.arange(width, device=device).expand(size, -1), width),
    )
    keys: list[Tensor] = []  # of the text, by layer
    values: list[Tensor] = []

    def attend_text(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(key)
        values.append(value)
        empty = key.new_empty(size, query.shape[1], 0, *key.shape[-2:])
        empty_mask = torch.ones(1, 0, dtype=torch.bool, device=device)
        visible_here = visible if layer == last_layer else visible_text
        return rollout_attention(query[:, :, None], key, value, visible_here, empty, empty, empty_mask)[:, :, 0]

    def attend_groups(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        causal = torch.ones(masks, masks, dtype=torch.bool, device=device).tril()
        return rollout_attention(query, keys[layer], values[layer], visible, key, value, causal)

    batch_index = torch.arange(size, device=device)[:, None]
    embedded = embedding(batch.tokens, embeddings)
    first = head(
        embedded, head.fuse(batch.features), rotation.cos_sin(range(width)), attend_text, (batch_index, anchors)
    )
    shape = (*anchors.shape, masks)
    positions = anchors[..., None] + 1 + torch.arange(masks, device=device)
    cos, sin = (component.view(*shape, 1, -1) for component in rotation.cos_sin(positions.flatten().tolist()))
    embedded, hidden = (mask.expand(*shape, -1) for mask in (head.mask_embedding, head.mask_hidden))
    later = head(embedded, hidden, (cos, sin), attend_groups)
    return head.logits(torch.cat([first[:, :, None], later], 2))


def head_losses(head: EagleHead, network: PreTrainedModel, features: FeatureStore, recipe: ParallelRecipe) -> Losses:
    distillation, embeddings = Distillation(head.to_target, network), TargetModel.of(network).embedding
    rotation = RotaryEmbedding(head.config, head.fc)

    def step_losses(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        batch = features.batch(batch_indices(len(features.texts), recipe.texts, recipe.seed, step), recipe.ahead)
        batch = sample_anchors(batch, recipe.share, 1_000_003 * recipe.seed + step)
        logits = parallel_logits(head, embeddings, rotation, batch)
        total, metrics = torch.zeros((), device=head.fc.device), {}
        for offset in range(recipe.ahead):
            loss, agreement = distillation.loss(
                logits[:, :, offset], batch.last_hidden_states[:, :, offset], batch.valid[..., offset]
            )
            total = total + DECAY**offset * loss
            metrics[f"same {offset + 1}"] = agreement
        yield total, {"loss": total.item(), **metrics}

    return step_losses


def train_head(
    network: PreTrainedModel, texts: Sequence[TargetOutput], recipe: ParallelRecipe, folder: Path
) -> EagleHead:
    texts = list(trainable_texts(texts))
    head = new_head(network, texts, recipe, layers=recipe.layers, parallel_tokens=recipe.ahead)
    features = FeatureStore(network, head.config.aux_hidden_state_layers, texts, recipe.memory_mb)
    train(folder, head, head_losses(head, network, features, recipe), recipe.schedule, build_optimizers=adamw)
    return head.eval()


def main() -> None:
    defaults = ParallelRecipe()
    parser = heads.build_parser("parallel", __doc__, defaults.steps, defaults.rate, defaults.texts, defaults.ahead)
    parser.add_argument("--layers", type=int, default=defaults.layers, help="of the head")
    args = heads.add_size_arguments(parser).parse_args()
    recipe = ParallelRecipe(**heads.head_recipe_arguments(args), layers=args.layers)
    heads.run(args, lambda network, texts, folder: train_head(network, texts, recipe, folder), heads.HEAD_PUBLISHER)


if __name__ == "__main__":
    main()
