"""Converts token ids to text incrementally.

The text contains no broken characters, loses no spaces, and ends before a stop string.
"""

from collections.abc import Iterable, Sequence
from typing import Self

from transformers import PreTrainedTokenizerBase

from parse.types import SamplingParams

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Converts the tokens of one text, piece by piece.

    Together, the pieces equal the decoded text of all tokens, up to a stop string.

    A tokenizer may decode a token differently at the start of a text than after another token. Each token is therefore
    decoded together with the tokens of the previous piece.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """With `include_stop`, the text ends after the stop string.

        A stop string that ends within the first `min_tokens` tokens is ignored.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._token_ids: list[int] = []
        self._decode_start = self._emitted = 0  # in tokens: the start of decoding, and the end of the released text
        self._held_back = ""  # text that may be the beginning of a stop string
        self.matched_stop: str | None = None
        """The stop string that was found.

        The caller of `add` then has to end the text: `generate` in `parse/engines/native/generation.py`, or
        `OutputBuilder` in `parse/engines/remote/output.py`.
        """

    @classmethod
    def for_params(cls, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> Self:
        return cls(tokenizer, params.stop, include_stop=params.include_stop_str_in_output, min_tokens=params.min_tokens)

    def add(self, token_ids: Iterable[int]) -> str:
        """Adds tokens and returns the text that can no longer change."""
        text = ""
        for token in token_ids:
            if self.matched_stop is not None:
                break
            self._token_ids.append(token)
            text += self._release(self._next_text())
        return text

    def finish(self) -> str:
        """Returns the text that was held back. Call it after the last token."""
        if self.matched_stop is not None:
            return ""
        rest = self._decode(self._decode_start, len(self._token_ids))[
            len(self._decode(self._decode_start, self._emitted)) :
        ]
        self._emitted = len(self._token_ids)
        released = self._release(rest)
        if self.matched_stop is None:
            released, self._held_back = released + self._held_back, ""
        return released

    def _next_text(self) -> str:
        before = self._decode(self._decode_start, self._emitted)
        now = self._decode(self._decode_start, len(self._token_ids))
        if now.endswith(REPLACEMENT_CHARACTER) or len(now) <= len(before):
            return ""
        self._decode_start, self._emitted = self._emitted, len(self._token_ids)
        return now[len(before) :]

    def _decode(self, first: int, last: int) -> str:
        if first == last:
            return ""
        return str(self._tokenizer.decode(self._token_ids[first:last], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held_back + text
        # The match that ends first is taken, so that token boundaries do not matter. Among matches with the same end,
        # the one that starts first is taken.
        matches = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches and len(self._token_ids) > self._min_tokens:
            end, start, self.matched_stop = min(matches)
            self._held_back = ""
            return text[: end if self._include_stop else start]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held_back = text[len(text) - keep :]
        return text[: len(text) - keep]
