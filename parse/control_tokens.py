"""Keeps client text from becoming control tokens, such as the end of a turn.

A chat template separates messages by control tokens. A tokenizer turns every occurrence of their text into these
tokens, also inside a message. A message, a tool or the result of a tool could therefore end its own turn and begin
another. `ControlTokens` encodes such an occurrence as ordinary text.

`apply_chat_template(..., sanitize_control_tokens=True)` of transformers works alike. This module also covers the keys
of dictionaries, notices a template that deletes the marks or assembles a token from client text, and returns the
rendered text, in which the pipeline looks for reasoning. It leaves the tokens alone that clients put into messages.

A separator that is no token of the model, such as `<|user|>` in OLMo 2, cannot be told from text.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

# The first two surround a control token in client text. The third takes the place of a character.
MARK_START, MARK_END, PLACEHOLDER = "\U0010fffb", "\U0010fffc", "\U0010fffd"
SEPARATOR = "\n"  # few tokenizers merge it with what follows
# Clients send these in messages: some write and read tool calls themselves, and answers contain reasoning.
MESSAGE_TOKENS = frozenset(
    "<think> </think> <seed:think> </seed:think> <tool_call> </tool_call> <tool_response> </tool_response>".split()
)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> "ControlTokens":
    return _control_tokens(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> "ControlTokens":
    """Returns the special tokens, and the added tokens that the template contains. The template can change."""
    texts = {*tokenizer.all_special_tokens, *(getattr(tokenizer, "chat_control_tokens", None) or ())}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content in chat_template:
            texts.add(token.content)
    # A single character cannot be divided, a word is no mark-up, and templates contain white space as text.
    markup = {text for text in texts if len(text) > 1 and not text.isalnum() and not text.isspace()}
    return ControlTokens(tokenizer, markup - MESSAGE_TOKENS)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a text without any control token."""
    control = control_tokens(tokenizer)
    return control.encode(control.mark(text))


class ControlTokens:
    """The control tokens of a model, and the texts that they are written as."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Collection[str]) -> None:
        self._tokenizer = tokenizer
        pattern = _alternatives(texts) or "(?!)"  # which never matches
        self._pattern = re.compile(pattern)
        self._first_characters = re.compile("|".join(sorted({re.escape(text[0]) for text in texts})) or "(?!)")
        self._marked = re.compile(f"{MARK_START}({pattern}){MARK_END}|[{MARK_START}{MARK_END}]")

    def mark(self, value: Any) -> Any:
        """Returns a JSON value in which the control tokens of all texts are marked.

        Marks that it already contains are removed.
        """
        return _map_texts(value, lambda text: self._pattern.sub(_mark, re.sub(f"[{MARK_START}{MARK_END}]", "", text)))

    def without_control_tokens(self, value: Any) -> Any:
        """Returns a JSON value whose texts cannot become control tokens, whatever a template does with them."""
        return _map_texts(value, lambda text: self._first_characters.sub(PLACEHOLDER, text))

    def count(self, rendered: str) -> int:
        """Returns the number of control tokens in a rendered text that are not marked."""
        return sum(len(self._pattern.findall(text)) for text in self._marked.split(rendered)[::2])

    def encode(self, rendered: str) -> list[int]:
        """Returns the tokens of a text that was rendered from marked values."""
        first, *parts = self._marked.split(rendered)
        token_ids = _encode(self._tokenizer, first)
        if not parts:
            return token_ids
        encode_marked, encode_other = (
            cache(self._encode_as_text),
            cache(self._encode_after_text),
        )  # texts may recur often
        for marked, text in zip(parts[::2], parts[1::2], strict=True):
            token_ids += encode_marked(marked or "")  # a lone mark has no text
            token_ids += encode_other(text)
        return token_ids

    def _encode_as_text(self, text: str) -> list[int]:
        if (match := self._pattern.search(text)) is None:
            return self._encode_after_text(text)
        split = match.start() + 1  # inside the control token
        return self._encode_after_text(text[:split]) + self._encode_as_text(text[split:])

    def _encode_after_text(self, text: str) -> list[int]:
        """Returns the tokens of a text inside another one, without the space that some tokenizers put first."""
        if not text:
            return []
        separator_ids, token_ids = _separator_ids(self._tokenizer), _encode(self._tokenizer, SEPARATOR + text)
        num_separators = len(separator_ids)
        return (
            token_ids[num_separators:]
            if token_ids[:num_separators] == separator_ids
            else _encode(self._tokenizer, text)
        )


def _mark(match: re.Match[str]) -> str:
    return f"{MARK_START}{match.group()}{MARK_END}"


def _map_texts(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, function): _map_texts(item, function) for key, item in value.items()}
    return [_map_texts(item, function) for item in value] if isinstance(value, Sequence) else value


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


@lru_cache(maxsize=8)
def _separator_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return _encode(tokenizer, SEPARATOR)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
