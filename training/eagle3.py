"""Trains an EAGLE-3 head for a target: it drafts several steps on from every anchor, and learns from each.

    python -m training.eagle3 --target models/demo-target                 # the demo pair's head
    python -m training.eagle3 --target some/model --outputs outputs.jsonl --out heads/some
    python -m training.eagle3 --target some/model --prompts prompts.jsonl --out heads/some

Each step feeds back the head's own guess of the feature in place of the true one, with the true next token
("training-time test"). Its loss is the cross-entropy with the target's distribution over the head's vocabulary, times
0.8 to the power of the step; nothing is asked of features. An interrupted run goes on where it was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import (
    EagleHead,
    EagleHeadConfig,
    ProposerLoadError,
    RotaryEmbedding,
    TargetModel,
)
from training import heads
from training.foresight import Batch, Library, by_frequency, shuffled, wholly
from training.loop import Cosine, Losses, adamw, train
from training.outputs import Output
from training.rollouts import rollout_attention, up_to

DECAY = 0.8  # of a step's loss against the one before


@dataclass(frozen=True)
class Recipe:
    steps: int = 1500
    rate: float = 4e-3
    warmup: int = 50
    texts: int = 8  # in a batch
    ahead: int = 7  # steps of drafting
    draft_vocabulary: int | None = None  # None: all tokens that the target ever wrote
    intermediate: int | None = None  # None: the target's
    seed: int = 0
    start: Path | None = None  # a head to go on from; its sizes and vocabulary stay
    memory_mb: int = 4096  # features are kept as far as that goes, and extracted again beyond

    @property
    def schedule(self) -> Cosine:
        return Cosine(self.steps, self.rate, self.warmup)


def new_head(
    network: PreTrainedModel, texts: Sequence[Output], recipe: Recipe, *, layers: int = 1, parallel: int = 1
) -> EagleHead:
    """Sizes are the target's, and so is `lm_head` to begin with; unless there is a head to start from."""
    target, config = TargetModel.of(network), network.config.get_text_config()
    if recipe.start:
        head, own = load_head(recipe.start, target)
        if (head.config.parallel_tokens > 1) != (parallel > 1):
            raise ProposerLoadError(f"{recipe.start} holds a head of another method")
        if not torch.equal(own, target.embedding):
            raise ProposerLoadError(f"{recipe.start} brings embeddings of its own, which are not trained here")
        head.config = replace(head.config, parallel_tokens=parallel)
        return head.float().requires_grad_(True)
    chosen = by_frequency(texts, target.vocab_size, recipe.draft_vocabulary)
    torch.manual_seed(recipe.seed)
    rope = dict(config.rope_parameters)
    head = EagleHead(
        EagleHeadConfig(
            hidden_size=target.hidden_size,
            intermediate_size=recipe.intermediate or config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or target.hidden_size // config.num_attention_heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(chosen),
            target_hidden_size=target.hidden_size,
            aux_hidden_state_layers=target.default_aux_layers,
            num_hidden_layers=layers,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=rope.pop("rope_theta", 10000.0),
            rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
            max_position_embeddings=config.max_position_embeddings,
            parallel_tokens=parallel,
        )
    )
    head.to_target = chosen
    output = network.get_output_embeddings().weight
    assert isinstance(output, Tensor)
    with torch.no_grad():
        head.lm_head.copy_(output[chosen.to(output.device)])
    return head.to(target.embedding.device)


class Distillation:
    """What the target would say, over those of its tokens that are chosen."""

    def __init__(self, chosen: Tensor, network: PreTrainedModel) -> None:
        self._read = network.get_output_embeddings()
        self._chosen = chosen
        self._known = torch.zeros(TargetModel.of(network).vocab_size, dtype=torch.bool, device=chosen.device)
        self._known[chosen] = True

    @torch.no_grad()
    def wanted(self, top: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The target's distribution, [.., draft vocabulary], and where it counts: its own choice is in there."""
        logits: Tensor = self._read(top).float()
        return logits[..., self._chosen].softmax(-1), valid & self._known[logits.argmax(-1)]

    def loss(self, logits: Tensor, top: Tensor, valid: Tensor) -> tuple[Tensor, float]:
        """The mean over what counts, and how often the head's choice is the target's."""
        wanted, counts = self.wanted(top, valid)
        weight = counts / counts.sum().clamp(min=1)
        loss = -((wanted * logits.log_softmax(-1)).sum(-1) * weight).sum()
        same = ((logits.argmax(-1) == wanted.argmax(-1)) * weight).sum()
        return loss, float(same) if bool(counts.any()) else float("nan")


def unrolled(head: EagleHead, embeddings: Tensor, rotation: RotaryEmbedding, given: Batch) -> Iterator[Tensor]:
    """The head's logits of every step on from all anchors, [B, A, draft vocabulary] each."""
    size, width = given.tokens.shape
    anchors, seen = given.anchors, up_to(given.anchors, width)
    keys: list[Tensor] = []  # the text's, then those of each step, [B, A, 1, key heads, d]
    values: list[Tensor] = []

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first = not keys
        keys.append(key if first else key[:, :, None])
        values.append(value if first else value[:, :, None])
        none = key.new_empty(size, anchors.shape[1], 0, *key.shape[-2:])
        own_keys, own_values = (torch.cat([none, *own[1:]], 2) for own in (keys, values))
        own_seen = torch.ones(1, own_keys.shape[2], dtype=torch.bool, device=key.device)
        return rollout_attention(query[:, :, None], keys[0], values[0], seen, own_keys, own_values, own_seen)[:, :, 0]

    rows = torch.arange(size, device=anchors.device)[:, None]
    embedded = embedding(given.tokens, embeddings)
    hidden = head(embedded, head.fuse(given.features), rotation.cos_sin(range(width)), attend, (rows, anchors))
    yield head.logits(hidden)
    for step in range(1, given.valid.shape[2]):
        embedded = embedding(given.next_tokens[..., step], embeddings)
        cos, sin = (turn.view(*anchors.shape, 1, -1) for turn in rotation.cos_sin((anchors + step).flatten().tolist()))
        hidden = head(embedded, hidden, (cos, sin), attend)
        yield head.logits(hidden)


def losses(head: EagleHead, network: PreTrainedModel, library: Library, recipe: Recipe) -> Losses:
    distillation, embeddings = Distillation(head.to_target, network), TargetModel.of(network).embedding
    rotation = RotaryEmbedding(head.config, head.fc)

    def of(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        given = library.batch(shuffled(len(library.texts), recipe.texts, recipe.seed, step), recipe.ahead)
        total, told = torch.zeros((), device=head.fc.device), {}
        for ahead, logits in enumerate(unrolled(head, embeddings, rotation, given)):
            loss, same = distillation.loss(logits, given.top[:, :, ahead], given.valid[..., ahead])
            total = total + DECAY**ahead * loss
            told[f"same {ahead + 1}"] = same
        yield total, {"loss": total.item(), **told}

    return of


def trained(network: PreTrainedModel, texts: Sequence[Output], recipe: Recipe, folder: Path) -> EagleHead:
    texts = list(wholly(texts))
    head = new_head(network, texts, recipe)
    library = Library(network, head.config.aux_hidden_state_layers, texts, recipe.memory_mb)
    train(folder, head, losses(head, network, library, recipe), recipe.schedule, optimized_by=adamw)
    return head.eval()


def main() -> None:
    usual = Recipe()
    parser = heads.arguments("eagle3", __doc__, usual.steps, usual.rate, usual.texts, usual.ahead)
    args = heads.with_sizes(parser).parse_args()
    recipe = Recipe(**heads.of_head(args))
    heads.run(args, lambda network, texts, folder: trained(network, texts, recipe, folder), heads.OF_HEADS)


if __name__ == "__main__":
    main()
