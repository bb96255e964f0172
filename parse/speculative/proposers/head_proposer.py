"""Texts as a head has read them: keys and values of each, and what of them it has yet to read.

Reading waits until somebody proposes: a text that nobody proposes for costs no pass, and several are read in one.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parse.speculative.proposal import NOT_YET, NOTHING, Foreseen, Foresight, Proposal, Wish
from parse.speculative.proposers.eagle_head import Attend, Head, Index, Rotation

UNSEEN = float("-inf")
FEW = 32  # queries
READ = 512  # elements at a time: a long prompt must not stall everybody's next token


class Text:
    """One request's. The element at position p stands for token p + 1 and the feature of token p."""

    def __init__(self) -> None:
        self.length = 0  # tokens taken
        self.read = 0  # elements whose keys and values are in memory
        # Elements yet to be read; the last one stays, to be read again by who asks again.
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.features: list[Tensor] = []
        self.keys = self.values = torch.empty(0)  # [layers, key heads, capacity, d]

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None = None) -> None:
        count = 0 if features is None else len(features)
        if count > min(len(tokens), self.length + len(tokens) - 1):
            raise ValueError(f"{count} rows of features are too many for {len(tokens)} tokens after {self.length}")
        self.length += len(tokens)
        if features is not None and count:  # it takes the place of whatever memory the features come from
            self.tokens += tokens[len(tokens) - count :]
            self.positions += range(self.length - 1 - count, self.length - 1)
            self.features.append(features.clone())

    @property
    def ready(self) -> bool:
        """Is the last token's element known?"""
        return bool(self.positions) and self.positions[-1] == self.length - 2

    @property
    def known(self) -> int:
        """Elements in all."""
        return self.read + len(self.tokens)

    def reserve(self, head: Head, beyond: int) -> None:
        """Memory for all elements and that many drafted ones."""
        needed, capacity = self.known + beyond, self.keys.shape[2] if self.keys.ndim == 4 else 0
        if needed <= capacity:
            return
        config = head.config
        shape = config.num_hidden_layers, config.num_key_value_heads, max(256, 2 * needed), config.head_dim
        for name in ("keys", "values"):
            old, new = getattr(self, name), head.fc.new_empty(shape)
            if self.read:
                new[:, :, : self.read] = old[:, :, : self.read]
            setattr(self, name, new)


class HeadMethod(Foresight[Text]):
    """What methods with a head have in common; they differ in how they come to their trees."""

    def __init__(self, head: Head, embedding: Tensor) -> None:
        self.head, self.embedding = head, embedding
        self._rotation = Rotation(head.config, head.fc)
        config = head.config
        self.taps = config.taps
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.bytes_per_token = numbers * head.fc.element_size()

    def proposer(self) -> Text:
        return Text()

    @torch.inference_mode()
    def propose(self, wishes: Sequence[Wish[Text]]) -> list[Proposal]:
        """For all of them, in the same passes."""
        self._read_ahead([wish.proposer for wish in wishes])
        able = [wish.proposer.ready and wish.most > 0 and len(wish.proposer.tokens) <= READ for wish in wishes]
        ready = [wish for wish, can in zip(wishes, able, strict=True) if can]
        found = iter(self._trees(ready) if ready else ())
        return [
            next(found) if can else NOT_YET if wish.proposer.ready else NOTHING
            for wish, can in zip(wishes, able, strict=True)
        ]

    def _read_ahead(self, texts: Sequence[Text]) -> None:
        """A piece of those that have much to read."""
        left = READ
        for text in texts:
            count = min(len(text.tokens) - 1, left)
            if len(text.tokens) > READ and count > 0:
                left -= count
                skim(self.head, self.embedding, self._rotation, text, count)

    @abstractmethod
    def _trees(self, wishes: Sequence[Wish[Text]]) -> list[Proposal]: ...


def skim(head: Head, embedding: Tensor, rotation: Rotation, text: Text, count: int) -> None:
    """Only keys and values of its next elements are wanted."""
    text.reserve(head, 0)
    features = text.features[0] if len(text.features) == 1 else torch.cat(text.features)
    tokens = torch.tensor(text.tokens[:count], device=embedding.device)
    turn = rotation.at(text.positions[:count])
    attend = _reading([text], [count], 1, len(head.layers) - 1)
    head(embedding[tokens], head.fused(features[:count]), turn, attend, slice(count - 1, None))
    text.read += count
    del text.tokens[:count], text.positions[:count]
    text.features = [features[count:]]


def read(
    head: Head,
    embedding: Tensor,
    rotation: Rotation,
    texts: Sequence[Text],
    masks: int = 0,
) -> Tensor:
    """What the head makes of the last element of each text, and of masks behind it: [texts, 1 + masks, H].

    All that is yet to be read is read, packed into one pass; masks leave nothing that counts.
    """
    counts = [len(text.tokens) for text in texts]
    features = [rows for text in texts for rows in text.features]
    tokens = torch.tensor([token for text in texts for token in text.tokens], device=embedding.device)
    positions = [at for text in texts for at in (*text.positions, *range(text.length - 1, text.length - 1 + masks))]
    hidden = head.fused(features[0] if len(features) == 1 else torch.cat(features))
    embedded = embedding[tokens]
    if masks:
        fill = head.mask_embedding.expand(masks, -1), head.mask_hidden.expand(masks, -1)
        embedded, hidden = (
            torch.cat([rows for part in known.split(counts) for rows in (part, mask)])
            for known, mask in zip((embedded, hidden), fill, strict=True)
        )
    if len(texts) == 1:
        keep: Index = slice(len(positions) - 1 - masks, None)
    else:
        ends = list(accumulate(count + masks for count in counts))
        keep = torch.cat([torch.arange(end - 1 - masks, end, device=tokens.device) for end in ends])
    turn = rotation.at(positions)
    sizes = [count + masks for count in counts]
    out = head(embedded, hidden, turn, _reading(texts, sizes, 1 + masks, len(head.layers) - 1), keep)
    for text in texts:
        text.read += len(text.tokens) - 1
        del text.tokens[:-1], text.positions[:-1]
        text.features = [text.features[-1][-1:]]
    return out.view(len(texts), 1 + masks, -1)


def _reading(texts: Sequence[Text], sizes: Sequence[int], last: int, top: int) -> Attend:
    """Causal attention of each text's new elements; in the topmost layer only of the last ones."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = []
        queries = query.split([last] * len(texts) if layer == top else list(sizes))
        rows = zip(texts, queries, key.split(list(sizes)), value.split(list(sizes)), strict=True)
        for text, asked, keys, values in rows:
            seen = text.read + len(keys)
            text.keys[layer, :, text.read : seen] = keys.transpose(0, 1)
            text.values[layer, :, text.read : seen] = values.transpose(0, 1)
            mask = None
            if len(asked) > 1:
                mask = asked.new_full((len(asked), seen), UNSEEN).triu(seen - len(asked) + 1)
            out.append(attention(asked, text.keys[layer, :, :seen], text.values[layer, :, :seen], mask))
        return out[0] if len(out) == 1 else torch.cat(out)

    return attend


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries [Q, heads, d] over keys [key heads, T, d], with an additive mask [Q, T], to [Q, heads * d].

    For the few queries of a draft plain products take less time than the CPU's fused kernel; for the many of a prompt
    they would take too much memory.
    """
    size, heads, width = query.shape
    groups = keys.shape[0]
    if size > FEW:
        rows = query.transpose(0, 1)[None], keys[None], values[None]
        fused = scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=groups != heads)
        return fused[0].transpose(0, 1).reshape(size, -1)
    scores = torch.bmm(
        (query * (1 / math.sqrt(width))).transpose(0, 1).reshape(groups, -1, width), keys.transpose(1, 2)
    )
    if mask is not None:
        scores.view(heads, size, -1).add_(mask)
    mixed = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)
    return mixed.view(heads, size, width).transpose(0, 1).reshape(size, -1)
