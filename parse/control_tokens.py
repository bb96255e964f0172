"""Encodes rendered conversations in which the text of a client never becomes a control token.

A chat template separates messages by control tokens, such as the end of a turn. A tokenizer turns every occurrence of
their text into these tokens, also inside a message. A message, a tool or the result of a tool could therefore end its
own turn and begin another. `ControlTokenEscapes` keeps such text as text, as OpenAI's API does.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

# While the template renders the conversation, such text is escaped: a number between two private characters.
ESCAPE_START, ESCAPE_END = "\U0010fffc", "\U0010fffd"
ESCAPE = re.compile(f"{ESCAPE_START}([0-9]+){ESCAPE_END}")
SEPARATOR = "\n"  # no tokenizer merges it with a letter or punctuation that follows


def control_token_pattern(
    tokenizer: PreTrainedTokenizerBase, rendered_conversation: str, ignored: Collection[str]
) -> re.Pattern[str]:
    """Returns a pattern of the texts to escape.

    These are the special tokens, and the added tokens that separate the turns of a plain conversation. The other added
    tokens, such as `<tool_call>`, stand for themselves: some clients put them into messages.
    """
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in rendered_conversation}
    texts |= set(tokenizer.all_special_tokens)
    # A single character cannot be encoded in parts, and a word is no mark-up.
    texts = {text for text in texts if len(text) > 1 and not text.isalnum() and not text.isspace()} - set(ignored)
    return re.compile("|".join(filter(None, (_alternatives(texts), ESCAPE_START, ESCAPE_END))))


def _alternatives(words: Collection[str]) -> str:
    """Returns a regular expression that matches the longest word, and reads each character once.

    Some tokenizers have thousands of special tokens that begin alike.
    """
    branches = [
        re.escape(first) + _alternatives([word[1:] for word in group])
        for first, group in groupby(sorted(filter(None, words)), key=lambda word: word[0])
    ]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}"


class ControlTokenEscapes:
    """The escaped texts of one conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pattern: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._pattern = pattern
        self._texts: list[str] = []

    def escape(self, value: Any) -> Any:
        """Returns a JSON value whose texts contain no control token."""
        if isinstance(value, str):
            return self._pattern.sub(self._add, value)
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        return [self.escape(item) for item in value] if isinstance(value, Sequence) else value

    def encode(self, rendered: str) -> list[int]:
        """Returns the tokens of a text that the template rendered from escaped values."""
        parts = ESCAPE.split(rendered)
        token_ids = encode(self._tokenizer, parts[0])
        for number, template_text in zip(parts[1::2], parts[2::2], strict=True):
            token_ids += self._encode_as_text(self._texts[int(number)]) + self._encode_after_text(template_text)
        return token_ids

    def _add(self, match: re.Match[str]) -> str:
        self._texts.append(match.group())
        return f"{ESCAPE_START}{len(self._texts) - 1}{ESCAPE_END}"

    def _encode_as_text(self, text: str) -> list[int]:
        if (match := self._pattern.search(text)) is None:
            return self._encode_after_text(text)
        split = match.start() + 1  # inside the control token
        return self._encode_after_text(text[:split]) + self._encode_as_text(text[split:])

    def _encode_after_text(self, text: str) -> list[int]:
        """Returns the tokens of a text inside another one, without the space that some tokenizers put first."""
        before, both = encode(self._tokenizer, SEPARATOR), encode(self._tokenizer, SEPARATOR + text)
        return both[len(before) :] if both[: len(before)] == before else encode(self._tokenizer, text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
