"""Trains a parallel head for a target: from every anchor, several masks foresee as many tokens at once.

    python -m training.parallel --target models/demo-target                 # the demo pair's head
    python -m training.parallel --target some/model --outputs outputs.jsonl --out heads/some

The masks of an anchor see the text up to it and the masks before them, and nobody else sees them: so all anchors of a
text are learnt from in one pass. Each place learns the target's distribution over the head's vocabulary.
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
from training.eagle3 import Distillation, Recipe, new_head
from training.foresight import Batch, Library, shuffled, some, wholly
from training.loop import Losses, adamw, train
from training.outputs import Output
from training.rollouts import rollout_attention, up_to

DECAY = 0.8  # of a place's loss against the one before


@dataclass(frozen=True)
class ParallelRecipe(Recipe):
    steps: int = 1200
    rate: float = 4e-3
    texts: int = 8
    ahead: int = 8  # tokens proposed in a pass
    layers: int = 2
    share: float = 0.5  # of the anchors that a batch learns from: masks cost the most, and every text comes again


def foreseen(head: EagleHead, embeddings: Tensor, rotation: RotaryEmbedding, given: Batch) -> Tensor:
    """The head's logits at all places ahead of all anchors, [B, A, S, draft vocabulary]."""
    size, width = given.tokens.shape
    anchors, top = given.anchors, len(head.layers) - 1
    masks = given.valid.shape[2] - 1
    device = anchors.device
    before, all_before = up_to(anchors, width), up_to(torch.arange(width, device=device).expand(size, -1), width)
    keys: list[Tensor] = []  # of the text, by layer
    values: list[Tensor] = []

    def text(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(key)
        values.append(value)
        none = key.new_empty(size, query.shape[1], 0, *key.shape[-2:])
        nothing = torch.ones(1, 0, dtype=torch.bool, device=device)
        seen = before if layer == top else all_before
        return rollout_attention(query[:, :, None], key, value, seen, none, none, nothing)[:, :, 0]

    def groups(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = torch.ones(masks, masks, dtype=torch.bool, device=device).tril()
        return rollout_attention(query, keys[layer], values[layer], before, key, value, own)

    rows = torch.arange(size, device=device)[:, None]
    embedded = embedding(given.tokens, embeddings)
    first = head(embedded, head.fuse(given.features), rotation.cos_sin(range(width)), text, (rows, anchors))
    shape = (*anchors.shape, masks)
    positions = anchors[..., None] + 1 + torch.arange(masks, device=device)
    cos, sin = (turn.view(*shape, 1, -1) for turn in rotation.cos_sin(positions.flatten().tolist()))
    embedded, hidden = (mask.expand(*shape, -1) for mask in (head.mask_embedding, head.mask_hidden))
    later = head(embedded, hidden, (cos, sin), groups)
    return head.logits(torch.cat([first[:, :, None], later], 2))


def losses(head: EagleHead, network: PreTrainedModel, library: Library, recipe: ParallelRecipe) -> Losses:
    distillation, embeddings = Distillation(head.to_target, network), TargetModel.of(network).embedding
    rotation = RotaryEmbedding(head.config, head.fc)

    def of(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        given = library.batch(shuffled(len(library.texts), recipe.texts, recipe.seed, step), recipe.ahead)
        given = some(given, recipe.share, 1_000_003 * recipe.seed + step)
        logits = foreseen(head, embeddings, rotation, given)
        total, told = torch.zeros((), device=head.fc.device), {}
        for ahead in range(recipe.ahead):
            loss, same = distillation.loss(logits[:, :, ahead], given.top[:, :, ahead], given.valid[..., ahead])
            total = total + DECAY**ahead * loss
            told[f"same {ahead + 1}"] = same
        yield total, {"loss": total.item(), **told}

    return of


def trained(network: PreTrainedModel, texts: Sequence[Output], recipe: ParallelRecipe, folder: Path) -> EagleHead:
    texts = list(wholly(texts))
    head = new_head(network, texts, recipe, layers=recipe.layers, parallel=recipe.ahead)
    library = Library(network, head.config.aux_hidden_state_layers, texts, recipe.memory_mb)
    train(folder, head, losses(head, network, library, recipe), recipe.schedule, optimized_by=adamw)
    return head.eval()


def main() -> None:
    usual = ParallelRecipe()
    parser = heads.arguments("parallel", __doc__, usual.steps, usual.rate, usual.texts, usual.ahead)
    parser.add_argument("--layers", type=int, default=usual.layers, help="of the head")
    args = heads.with_sizes(parser).parse_args()
    recipe = ParallelRecipe(**heads.of_head(args), layers=args.layers)
    heads.run(args, lambda network, texts, folder: trained(network, texts, recipe, folder), heads.OF_HEADS)


if __name__ == "__main__":
    main()
