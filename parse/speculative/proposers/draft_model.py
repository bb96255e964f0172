"""A small model beside the target drafts a chain, token by token; it has to speak the same tokens.

It keeps keys and values of all texts, and of their common beginnings, as the engine does. What it has drafted and the
target accepted it need not read again.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from weakref import finalize

import torch
from torch import Tensor

from parse.engines.native.kv_cache import Memory
from parse.engines.native.model import Dtype, Model
from parse.engines.native.paged_attention import PAGE, attention_on
from parse.engines.native.prefix_cache import Cache, Context
from parse.engines.native.scheduled_chunk import Span
from parse.speculative.proposal import NOT_YET, NOTHING, Foreseen, Foresight, Proposal, Wish, chained
from parse.speculative.proposers.eagle_head import HeadError

READ = 512  # tokens at a time: long prompts must not stall everybody's next token
FEW = 32  # tokens that are read with the first step of drafting, and not before it


class DraftModel(Foresight["Drafting"]):
    def __init__(self, model: Model, vocabulary: int | None = None) -> None:
        """For a target of so many tokens, if not as many."""
        self.model, self.vocabulary = model, vocabulary or model.vocabulary
        self.bytes_per_token = model.bytes_per_token
        self._attend = attention_on(model.device)
        self._memory: Memory | None = None
        self._closed: deque[Context] = deque()  # by whichever thread lets go of a text
        self._forgetful = False

    @classmethod
    def load(cls, path: str | Path, target: Model, *, device: str, dtype: Dtype) -> Self:
        model = Model.load(path, device=device, dtype=dtype)
        if model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
            raise HeadError(f"{path} does not speak the target's tokens: its tokenizer is another one")
        if model.vocabulary < (needed := max(target.tokenizer.get_vocab().values()) + 1):
            raise HeadError(f"{path} knows {model.vocabulary} tokens, the target's tokenizer {needed}")
        return cls(model, target.vocabulary)

    def reserve(self, contexts: int, capacity: int) -> None:
        """Memory for so many texts of so many tokens."""
        self.longest = min(capacity, self.model.longest)
        size = capacity if self.model.device.type == "cpu" else PAGE
        self._memory = Memory(contexts * capacity // size, size)
        self._cache = Cache(self._memory.pages, size, self._memory.copy)

    def forget(self) -> None:
        self._forgetful = True

    def proposer(self) -> "Drafting":
        return Drafting()

    @torch.inference_mode()
    def propose(self, wishes: Sequence[Wish["Drafting"]]) -> list[Proposal]:
        while self._closed:
            self._cache.close(self._closed.popleft())
        if self._forgetful:
            self._forgetful = False
            self._cache.forget()
        self._left = READ
        texts = [wish.proposer for wish in wishes]
        drafts: dict[Drafting, list[int]] = {}
        chances: dict[Drafting, list[float]] = {}
        going = {wish.proposer: wish for wish in wishes if self._catch_up(wish.proposer)}
        while going := {text: wish for text, wish in going.items() if self._fits(text)}:
            for text, token, chance in self._step(list(going)):
                likely = chance * (chances[text][-1] if text in chances else 1.0)
                wish = going[text]
                if likely < wish.floor:
                    del going[text]
                    continue
                drafts.setdefault(text, []).append(token)
                chances.setdefault(text, []).append(likely)
                text.drafted.append(token)
                if len(drafts[text]) == min(wish.most, wish.depth):
                    del going[text]
        return [
            chained(drafts[text], chances[text])
            if text in drafts
            else NOTHING
            if text.read or not self._readable(text)
            else NOT_YET
            for text in texts
        ]

    def _catch_up(self, text: "Drafting") -> bool:
        """Takes over what was drafted and accepted, and reads the rest but its last few tokens."""
        if not text.ahead or not self._readable(text):
            return False
        if text.context is None:
            context = self._cache.open(text.ahead[:-1], 1)
            if context is None:
                return False
            text.context, text.ahead = context, text.ahead[-1:]
            finalize(text, self._closed.append, context)
        context = text.context
        known = 0
        while known < min(text.run, len(text.ahead) - 1) and text.drafted[known] == text.ahead[known]:
            known += 1
        if known:
            self._cache.commit(context, text.ahead[:known])
            del text.ahead[:known]
        text.drafted, text.run = [], 0
        if len(text.ahead) > FEW:
            context.tokens += text.ahead[:-1]
            del text.ahead[:-1]
        missing = len(context.tokens) - context.computed
        if missing > 0:
            count = min(missing, self._left)
            if not count or not self._cache.reserve(context, len(context.tokens)):
                return False
            self._left -= count
            self._forward([Span(context, (), context.computed, context.computed + count)], [])
            context.computed += count
        return text.read

    def _readable(self, text: "Drafting") -> bool:
        """A target may know more positions, and more tokens than its tokenizer has."""
        return text.length <= self.longest and max(text.ahead, default=0) < self.model.vocabulary

    def _fits(self, text: "Drafting") -> bool:
        assert text.context is not None
        needed = len(text.context.tokens) + len(text.ahead) + len(text.drafted)
        return needed <= self.longest and self._cache.reserve(text.context, needed)

    def _step(self, texts: "Sequence[Drafting]") -> "list[tuple[Drafting, int, float]]":
        """One more token of each, and how likely it is."""
        spans = []
        for text in texts:
            context = text.context
            assert context is not None
            nodes = text.drafted or text.ahead
            last = len(context.tokens) + len(nodes)
            spans.append((text, Span(context, list(nodes), last - (1 if text.drafted else len(nodes)), last)))
        spans.sort(key=lambda part: (len(part[1]), part[1].context.pages[0]))  # single tokens side by side in memory
        ends, size = [], 0
        for _, span in spans:
            size += len(span)
            ends.append(size - 1)
        logits = self._forward([span for _, span in spans], ends)[:, : self.vocabulary]
        chances, tokens = logits.softmax(-1).max(-1)
        for text, _ in spans:
            assert text.context is not None
            if not text.drafted:  # what was new in the text is read now, all but the drafts belongs to it
                self._cache.commit(text.context, text.ahead)
                text.ahead = []
            else:
                text.run = len(text.drafted)
        return [
            (text, token, chance)
            for (text, _), token, chance in zip(spans, tokens.tolist(), chances.tolist(), strict=True)
        ]

    def _forward(self, spans: Sequence[Span], read: Sequence[int]) -> Tensor:
        assert self._memory is not None, "asked before memory was reserved"
        tokens = [token for span in spans for token in span.tokens()]
        positions = [position for span in spans for position in span.positions()]
        logits, _ = self.model.forward(tokens, positions, self._attend(self._memory, spans), read)
        return logits


class Drafting:
    """The text of one request, as the small model has read it."""

    def __init__(self) -> None:
        self.context: Context | None = None
        self.ahead: list[int] = []  # tokens of the text behind the context
        self.drafted: list[int] = []
        self.run = 0  # of them, those whose keys and values stand behind the context
        self.length = 0

    @property
    def read(self) -> bool:
        """All but what is ahead?"""
        return self.context is not None and self.context.computed == len(self.context.tokens)

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        self.ahead += tokens
        self.length += len(tokens)
