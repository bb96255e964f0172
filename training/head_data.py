"""The training data of heads: hidden states (*features*) and next tokens of the target, on texts that it generated.

Element i combines the feature of token i with token i + 1, and predicts token i + 2. Heads learn at the *anchors*, the
elements whose predicted token the target generated. The other elements are only attended to.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.outputs import TargetOutput


@dataclass(frozen=True)
class HeadFeatures:
    """The features of one text of T tokens, which has T - 1 elements."""

    aux_hidden_states: Tensor  # [T - 1, aux layers * H], in half precision, for tokens 0..T-2
    last_hidden_states: Tensor  # [W, H], the input of the target's lm_head at the tokens that anchors learn from
    first_anchor: int


@dataclass(frozen=True)
class HeadBatch:
    features: Tensor  # [B, T, aux layers * H]
    tokens: Tensor  # [B, T], the token that follows the token of each feature
    anchors: Tensor  # [B, A], indices of elements
    valid: Tensor  # [B, A, S], whether there is something to learn s tokens later
    next_tokens: Tensor  # [B, A, S], the token of the element s positions after each anchor
    last_hidden_states: Tensor  # [B, A, S, H], of the target, where it predicts the same token as the head in step s


class FeatureStore:
    """Features of texts, extracted on first use and cached in up to `memory_mb` of memory."""

    def __init__(
        self,
        network: PreTrainedModel,
        aux_hidden_state_layers: Sequence[int],
        texts: Sequence[TargetOutput],
        memory_mb: int,
    ) -> None:
        self.network, self.aux_hidden_state_layers, self.texts = network.eval(), tuple(aux_hidden_state_layers), texts
        self._free_bytes = memory_mb * 2**20
        self._cached: dict[int, HeadFeatures] = {}

    def batch(self, indices: Sequence[int], steps: int) -> HeadBatch:
        missing = [k for k in indices if k not in self._cached]
        features = {k: self._cached[k] for k in indices if k in self._cached}
        if missing:
            features |= dict(zip(missing, self._extract([self.texts[k] for k in missing]), strict=True))
            for k in missing:
                size = sum(
                    t.numel() * t.element_size()
                    for t in (features[k].aux_hidden_states, features[k].last_hidden_states)
                )
                if size <= self._free_bytes:
                    self._cached[k] = features[k]
                    self._free_bytes -= size
        return collate_features([self.texts[k] for k in indices], [features[k] for k in indices], steps)

    @torch.inference_mode()
    def _extract(self, texts: Sequence[TargetOutput]) -> list[HeadFeatures]:
        width = max(len(text.tokens) for text in texts)
        input_ids = torch.tensor([text.tokens + [0] * (width - len(text.tokens)) for text in texts])
        # A text never sees the padding after it, so no mask is needed.
        out = self.network(
            input_ids=input_ids.to(self.network.device), output_hidden_states=True, use_cache=False, logits_to_keep=1
        )
        states = out.hidden_states
        aux_hidden_states = torch.cat([states[layer] for layer in self.aux_hidden_state_layers], -1)
        features = []
        for text, aux, top in zip(texts, aux_hidden_states, states[-1], strict=True):
            size = len(text.tokens)
            first = max(0, len(text.prompt) + text.begun - 2)
            text_aux_states, text_last_states = (
                states[start : size - 1].half().clone() for states, start in ((aux, 0), (top, first + 1))
            )
            features.append(HeadFeatures(text_aux_states, text_last_states, first))
        return features


def collate_features(texts: Sequence[TargetOutput], features: Sequence[HeadFeatures], steps: int) -> HeadBatch:
    """Lays out a batch. In step s, anchor i learns the target's distribution after token i + 1 + s."""
    sizes = [len(text.tokens) for text in texts]
    num_anchors = [len(text_features.last_hidden_states) for text_features in features]  # anchors of each
    width, max_anchors = max(sizes) - 1, max(num_anchors)
    size, depth = len(texts), features[0].aux_hidden_states.shape[1]
    device = features[0].aux_hidden_states.device
    aux_hidden_states = torch.zeros(size, width, depth, device=device)
    last_hidden_states = torch.zeros(size, max_anchors + steps, features[0].last_hidden_states.shape[1], device=device)
    tokens = torch.zeros(size, width + steps, dtype=torch.long)
    anchors = torch.zeros(size, max_anchors, dtype=torch.long)
    valid = torch.zeros(size, max_anchors + steps, dtype=torch.bool)
    for row, (text, text_features, count) in enumerate(zip(texts, features, num_anchors, strict=True)):
        aux_hidden_states[row, : sizes[row] - 1] = text_features.aux_hidden_states
        last_hidden_states[row, :count] = text_features.last_hidden_states
        tokens[row, : sizes[row] - 1] = torch.tensor(text.tokens[1:])
        anchors[row, :count] = torch.arange(text_features.first_anchor, text_features.first_anchor + count)
        valid[row, :count] = True
    offsets = torch.arange(max_anchors)[:, None] + torch.arange(steps)  # [A, S]
    tokens = tokens.to(device)
    anchors = anchors.to(device)
    later = (anchors[..., None] + torch.arange(steps, device=device)).flatten(1)
    return HeadBatch(
        aux_hidden_states,
        tokens[:, :width],
        anchors,
        valid.to(device)[:, offsets],
        tokens.gather(1, later).view(size, max_anchors, steps),
        last_hidden_states[:, offsets],
    )


def sample_anchors(batch: HeadBatch, share: float, seed: int) -> HeadBatch:
    """Returns the batch with a random share of the anchors."""
    max_anchors = batch.anchors.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = (
        torch.randperm(max_anchors, generator=generator)[: max(1, round(share * max_anchors))]
        .sort()
        .values.to(batch.anchors.device)
    )
    return replace(
        batch,
        anchors=batch.anchors[:, chosen],
        valid=batch.valid[:, chosen],
        next_tokens=batch.next_tokens[:, chosen],
        last_hidden_states=batch.last_hidden_states[:, chosen],
    )


def batch_indices(count: int, size: int, seed: int, step: int) -> list[int]:
    """Returns the indices of batch `step` in endless rounds over all texts, each in a new order."""
    rounds, start = divmod(step * size, count)
    indices: list[int] = []
    while len(indices) < size:
        order = random.Random(f"{seed}/{rounds}").sample(range(count), count)
        indices += order[start : start + size - len(indices)]
        rounds, start = rounds + 1, 0
    return indices


def most_frequent_tokens(texts: Sequence[TargetOutput], vocab_size: int, count: int | None) -> Tensor:
    """Returns the `count` most frequent output tokens, sorted by id. None: all that occur."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(torch.tensor(text.output), minlength=vocab_size)
    num_tokens = min(count or int((counts > 0).sum()), vocab_size)
    return counts.sort(descending=True, stable=True).indices[:num_tokens].sort().values


def trainable_texts(texts: Sequence[TargetOutput]) -> Iterator[TargetOutput]:
    """Yields the texts that contain anything to learn from."""
    return (text for text in texts if len(text.output) > text.begun and len(text.tokens) > 2)
