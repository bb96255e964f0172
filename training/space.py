"""Teaches a target to foresee at masks: adapters that act there and nowhere else, for decoding by SPACE.

    python -m training.space --target models/demo-target                 # the demo pair's adapters
    python -m training.space --target some/model --outputs outputs.jsonl --out adapters/some

Behind every anchor stand several masks. Mask s is to say what the target will, s tokens beyond its next one; it sees
the text up to the anchor and the masks before it. The target itself is frozen: its keys and values of the text are
computed once, and what is learnt is learnt through its layers. An interrupted run goes on where it was.
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
from parse.speculative.proposers.eagle_head import ProposerLoadError
from parse.speculative.proposers.space_adapters import SpaceAdapters, SpaceAdaptersConfig, load_adapters, save_adapters
from training import heads
from training.acceptance import Acceptance, by_kind, followed, told
from training.eagle3 import Distillation
from training.foresight import Batch, Features, batch, shuffled, some, wholly
from training.head_cards import write_space_card
from training.lessons import half_pays
from training.loop import Cosine, Losses, adamw, train
from training.outputs import Output
from training.rollouts import rollout_attention, up_to

DECAY = 0.9  # of a mask's loss against the one before
GROUP_ATTENTION = "mask_groups"


@dataclass(frozen=True)
class SpaceRecipe:
    steps: int = 2000
    rate: float = 4e-3
    warmup: int = 50
    texts: int = 8  # in a batch
    ahead: int = 8  # masks behind an anchor
    rank: int = 64
    share: float = 0.35  # of the anchors that a batch learns from: masks are most of the work, and texts come again
    seed: int = 0
    start: Path | None = None  # adapters to go on from; their sizes stay

    @property
    def schedule(self) -> Cosine:
        return Cosine(self.steps, self.rate, self.warmup)


@dataclass(frozen=True)
class Groups:
    """What the masks see: the text up to their anchors, and those of their own group that stand before them."""

    text: DynamicCache
    seen: Tensor  # [B, A, T] bool

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[B, heads, A * S, d] each, to [B, A * S, heads, d]."""
        anchors = self.seen.shape[1]
        grouped = (rows.transpose(1, 2).unflatten(1, (anchors, -1)) for rows in (query, key, value))
        query, key, value = grouped
        size, masks, width = len(query), query.shape[2], query.shape[-1]
        past = self.text.layers[layer]
        assert isinstance(past, CacheLayerMixin) and past.keys is not None and past.values is not None
        own = torch.ones(masks, masks, dtype=torch.bool, device=query.device).tril()
        query = query * (scale * width**0.5)  # the rollout's attention scales by the width
        text_keys, text_values = (rows.transpose(1, 2) for rows in (past.keys, past.values))
        out = rollout_attention(query, text_keys, text_values, self.seen, key, value, own)
        return out.reshape(size, anchors * masks, -1, width)


def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    groups: Groups | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    if groups is None:  # the text: what stands behind it is never seen by it, so padding needs no mask
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    number = module.layer_idx
    assert isinstance(number, int)
    return groups.attend(number, query, key, value, scaling), None


AttentionInterface.register(GROUP_ATTENTION, group_attention)


def lesson(
    network: PreTrainedModel, texts: Sequence[Output], ahead: int, *, share: float = 1.0, seed: int = 0
) -> tuple[Batch, Groups]:
    """Of anchors i, whose next token is known: mask s learns from what the target says s tokens beyond that."""
    network.set_attn_implementation(GROUP_ATTENTION)
    width = max(len(text.tokens) for text in texts)
    rows = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in texts], device=network.device)
    known = DynamicCache(config=network.config)
    with torch.no_grad():
        out = network(
            input_ids=rows, past_key_values=known, use_cache=True, output_hidden_states=True, logits_to_keep=1
        )
    features = []
    for text, top in zip(texts, out.hidden_states[-1], strict=True):
        first = max(0, len(text.prompt) + text.begun - 2)
        features.append(
            Features(top.new_empty(len(text.tokens) - 1, 0), top[first + 1 : len(text.tokens)].float(), first)
        )
    given = some(batch(texts, features, ahead + 1), share, seed)
    return given, Groups(known, up_to(given.anchors + 1, width))


def foreseen(adapters: SpaceAdapters, network: PreTrainedModel, given: Batch, groups: Groups) -> Tensor:
    """The target's logits at all masks of all anchors, [B, A, S, vocabulary]."""
    size, anchors, masks = *given.anchors.shape, given.valid.shape[2] - 1
    positions = given.anchors[..., None] + 2 + torch.arange(masks, device=given.anchors.device)
    embedded = adapters.mask_embedding.expand(size, anchors * masks, -1)
    with adapters.at(slice(None)):
        out = network(inputs_embeds=embedded, position_ids=positions.flatten(1), use_cache=False, groups=groups)
    logits: Tensor = out.logits.float()
    return logits.unflatten(1, (anchors, masks))


def losses(adapters: SpaceAdapters, network: PreTrainedModel, texts: Sequence[Output], recipe: SpaceRecipe) -> Losses:
    device = network.device
    distillation = Distillation(torch.arange(network.config.get_text_config().vocab_size, device=device), network)
    half = half_pays(device.type)

    def of(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        chosen = [texts[k] for k in shuffled(len(texts), recipe.texts, recipe.seed, step)]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            seed = 1_000_003 * recipe.seed + step
            given, groups = lesson(network, chosen, recipe.ahead, share=recipe.share, seed=seed)
            logits = foreseen(adapters, network, given, groups)
        total, told = torch.zeros((), device=device), {}
        for mask in range(recipe.ahead):
            loss, same = distillation.loss(logits[:, :, mask], given.top[:, :, mask + 1], given.valid[..., mask + 1])
            total = total + DECAY**mask * loss
            told[f"same {mask + 1}"] = same
        yield total, {"loss": total.item(), **told}

    return of


def acceptance(adapters: SpaceAdapters, network: PreTrainedModel, texts: Sequence[Output]) -> Acceptance:
    """Of candidates that the masks behind the last accepted one foresaw, a group being there wherever that was."""
    lengths: list[int] = []
    passes = tokens = proposed = 0
    with torch.inference_mode():
        for text in texts:
            given, groups = lesson(network, [text], adapters.config.masks)
            guesses = foreseen(adapters, network, given, groups).argmax(-1)[0].tolist()
            # Those of the masks behind token t say what stands from t + 2 on.
            behind = dict(zip((given.anchors[0] + 1).tolist(), guesses, strict=True))
            at = len(text.prompt) + text.begun
            candidates: list[int] = []
            while at < len(text.tokens):
                proposal = chain_proposal(candidates)
                lengths.append(followed(proposal, text.tokens[at:]))
                proposed += len(candidates)
                known, last = at, at + lengths[-1] - 1
                at = min(last + 2, len(text.tokens))
                candidates = behind.get(last, [])
                passes, tokens = passes + 1, tokens + at - known
    longest = max(lengths, default=0)
    shares = tuple(sum(length > place for length in lengths) / passes for place in range(longest))
    return Acceptance(passes, tokens, shares, proposed / max(1, passes), 0.0)


def figures(path: Path, network: PreTrainedModel, texts: Sequence[Output]) -> dict[str, Any]:
    adapters = load_adapters(path, network).attach(network)
    of = {kind: told(acceptance(adapters, network, some)) for kind, some in by_kind(texts).items()}
    return {"texts": len(texts), "ways": {"chain": {"most": adapters.config.masks, "of": of}}}


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


def trained(network: PreTrainedModel, texts: Sequence[Output], recipe: SpaceRecipe, folder: Path) -> SpaceAdapters:
    network.requires_grad_(False)
    adapters = new_adapters(network, recipe).attach(network)
    train(folder, adapters, losses(adapters, network, list(wholly(texts)), recipe), recipe.schedule, optimized_by=adamw)
    return adapters.eval()


def main() -> None:
    usual = SpaceRecipe()
    parser = heads.arguments("space", __doc__, usual.steps, usual.rate, usual.texts, usual.ahead)
    parser.add_argument("--rank", type=int, default=usual.rank, help="of the networks behind the layers")
    args = parser.parse_args()
    recipe = SpaceRecipe(**heads.chosen(args), rank=args.rank)
    publishing = heads.Publishing[SpaceAdapters](
        lambda adapters, folder, dtype: save_adapters(adapters, folder, dtype=dtype), figures, write_space_card
    )
    heads.run(args, lambda network, texts, folder: trained(network, texts, recipe, folder), publishing)


if __name__ == "__main__":
    main()
