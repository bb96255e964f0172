"""Token ids to text, piece by piece: no half character, no lost space, nothing of a stop string."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Pieces of text that together are what the tokenizer makes of all tokens at once, up to a stop string.

    A tokenizer may write a token otherwise at the beginning than after another one, so each is decoded together with
    those before it, back to the last that ended a piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from = self._said = 0  # tokens: where decoding sets in, and what has become text
        self._held = ""  # might be the beginning of a stop string
        self.stopped: str | None = None
        """The stop string that was met."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that is certain now."""
        text = ""
        for token in ids:
            if self.stopped is not None:
                break
            self._ids.append(token)
            text += self._release(self._next())
        return text

    def end(self) -> str:
        """What was held back: no more tokens will come."""
        if self.stopped is not None:
            return ""
        rest = self._decode(self._from, len(self._ids))[len(self._decode(self._from, self._said)) :]
        self._said = len(self._ids)
        released = self._release(rest)
        if self.stopped is None:
            released, self._held = released + self._held, ""
        return released

    def _next(self) -> str:
        before = self._decode(self._from, self._said)
        now = self._decode(self._from, len(self._ids))
        if now.endswith(BROKEN) or len(now) <= len(before):
            return ""
        self._from, self._said = self._said, len(self._ids)
        return now[len(before) :]

    def _decode(self, first: int, last: int) -> str:
        if first == last:
            return ""
        return str(self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        # The first to be complete, wherever the tokens' borders lie, and of those the first to begin.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
