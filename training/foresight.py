"""What heads that foresee a target learn from: its features and next tokens, on texts that it wrote itself.

Element i joins the feature of token i with token i + 1, and is asked for token i + 2. The elements to learn from are
the *anchors*, those whose answer the target wrote; the others are only seen.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.outputs import Output


@dataclass(frozen=True)
class Features:
    """Of one text of T tokens, T - 1 elements."""

    taps: Tensor  # [T - 1, taps * H], in half precision: of tokens 0..T-2
    top: Tensor  # [W, H], what the target's own head reads at the tokens that anchors learn from
    first: int  # the first anchor


@dataclass(frozen=True)
class Batch:
    features: Tensor  # [B, T, taps * H]
    tokens: Tensor  # [B, T], of each element: the one after its feature's
    anchors: Tensor  # [B, A], elements
    valid: Tensor  # [B, A, S]: is there something to learn s tokens on?
    next_tokens: Tensor  # [B, A, S], the token of the element s places behind each anchor
    top: Tensor  # [B, A, S, H], of the target where it foresees what the element s places on does


class Library:
    """Features of texts, extracted when first asked for, and kept as far as `memory_mb` goes."""

    def __init__(self, network: PreTrainedModel, taps: Sequence[int], texts: Sequence[Output], memory_mb: int) -> None:
        self.network, self.taps, self.texts = network.eval(), tuple(taps), texts
        self._room = memory_mb * 2**20
        self._kept: dict[int, Features] = {}

    def batch(self, chosen: Sequence[int], steps: int) -> Batch:
        lacking = [k for k in chosen if k not in self._kept]
        found = {k: self._kept[k] for k in chosen if k in self._kept}
        if lacking:
            found |= dict(zip(lacking, self._extract([self.texts[k] for k in lacking]), strict=True))
            for k in lacking:
                size = sum(t.numel() * t.element_size() for t in (found[k].taps, found[k].top))
                if size <= self._room:
                    self._kept[k] = found[k]
                    self._room -= size
        return batch([self.texts[k] for k in chosen], [found[k] for k in chosen], steps)

    @torch.inference_mode()
    def _extract(self, texts: Sequence[Output]) -> list[Features]:
        width = max(len(text.tokens) for text in texts)
        rows = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in texts])
        # What stands behind a text is never seen by it, so padding needs no mask.
        out = self.network(
            input_ids=rows.to(self.network.device), output_hidden_states=True, use_cache=False, logits_to_keep=1
        )
        states = out.hidden_states
        taps = torch.cat([states[tap] for tap in self.taps], -1)
        features = []
        for text, tapped, top in zip(texts, taps, states[-1], strict=True):
            size = len(text.tokens)
            first = max(0, len(text.prompt) + text.begun - 2)
            below, above = (rows[start : size - 1].half().clone() for rows, start in ((tapped, 0), (top, first + 1)))
            features.append(Features(below, above, first))
        return features


def batch(texts: Sequence[Output], features: Sequence[Features], steps: int) -> Batch:
    """Anchor i learns in step s from what the target says at token i + 1 + s; the last token foresees nothing."""
    sizes = [len(text.tokens) for text in texts]
    counts = [len(found.top) for found in features]  # anchors of each
    width, wide = max(sizes) - 1, max(counts)
    size, depth = len(texts), features[0].taps.shape[1]
    device = features[0].taps.device
    taps = torch.zeros(size, width, depth, device=device)
    tops = torch.zeros(size, wide + steps, features[0].top.shape[1], device=device)
    tokens = torch.zeros(size, width + steps, dtype=torch.long)
    anchors = torch.zeros(size, wide, dtype=torch.long)
    valid = torch.zeros(size, wide + steps, dtype=torch.bool)
    for row, (text, found, count) in enumerate(zip(texts, features, counts, strict=True)):
        taps[row, : sizes[row] - 1] = found.taps
        tops[row, :count] = found.top
        tokens[row, : sizes[row] - 1] = torch.tensor(text.tokens[1:])
        anchors[row, :count] = torch.arange(found.first, found.first + count)
        valid[row, :count] = True
    ahead = torch.arange(wide)[:, None] + torch.arange(steps)  # [A, S]
    tokens = tokens.to(device)
    anchors = anchors.to(device)
    later = (anchors[..., None] + torch.arange(steps, device=device)).flatten(1)
    return Batch(
        taps,
        tokens[:, :width],
        anchors,
        valid.to(device)[:, ahead],
        tokens.gather(1, later).view(size, wide, steps),
        tops[:, ahead],
    )


def some(given: Batch, share: float, seed: int) -> Batch:
    """With that share of the anchors, drawn by chance."""
    wide = given.anchors.shape[1]
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(wide, generator=draw)[: max(1, round(share * wide))].sort().values.to(given.anchors.device)
    return replace(
        given,
        anchors=given.anchors[:, chosen],
        valid=given.valid[:, chosen],
        next_tokens=given.next_tokens[:, chosen],
        top=given.top[:, chosen],
    )


def shuffled(count: int, size: int, seed: int, step: int) -> list[int]:
    """Batch `step` of an endless run through all of them, in an order of its own every time."""
    rounds, place = divmod(step * size, count)
    chosen: list[int] = []
    while len(chosen) < size:
        order = random.Random(f"{seed}/{rounds}").sample(range(count), count)
        chosen += order[place : place + size - len(chosen)]
        rounds, place = rounds + 1, 0
    return chosen


def by_frequency(texts: Sequence[Output], vocabulary: int, count: int | None) -> Tensor:
    """The `count` tokens that were written most, by id (None: all that were written at all)."""
    seen = torch.zeros(vocabulary, dtype=torch.long)
    for text in texts:
        seen += torch.bincount(torch.tensor(text.output), minlength=vocabulary)
    wanted = min(count or int((seen > 0).sum()), vocabulary)
    return seen.sort(descending=True, stable=True).indices[:wanted].sort().values


def wholly(texts: Sequence[Output]) -> Iterator[Output]:
    """Those that hold anything to learn from."""
    return (text for text in texts if len(text.output) > text.begun and len(text.tokens) > 2)
