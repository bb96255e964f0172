"""Reasoning blocks: text in which a model thinks before it answers, such as `<think>...</think>`.

A chat template may open the block in the prompt, leave it to the model, or close it. A verification needs it closed,
because the target has to reply to the verification prompt with one word.

Inside a block, nothing is drafted in the modes that verify prefixes: whether a thought is correct so far is not a
question that the target can answer. Mode `exact` and the token-level methods work there as anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ReasoningState = Literal["none", "open", "expected"]
"""How an answer begins.

"none": without reasoning. "open": inside a block that the prompt has opened. "expected": the model may open a block
itself."""

# Templates name the switch differently. Jinja ignores the one that a template does not use.
WITHOUT_REASONING: Mapping[str, Any] = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}


@dataclass(frozen=True)
class ReasoningTags:
    """The texts that begin and end a reasoning block."""

    start: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside a block."""
        return prompt.rstrip().endswith(self.start)

    def close(self, prompt: str) -> str:
        """Returns a prompt in which the block at its end, if there is an open one, is closed and empty."""
        return f"{prompt.rstrip()}\n\n{self.end}\n\n" if self.is_open(prompt) else prompt

    def without_trailing_block(self, prompt: str) -> str:
        """Returns a prompt without an empty block and white space at its end."""
        before = ""
        while before != prompt:
            before, prompt = prompt, prompt.rstrip()
            for tag in (self.end, self.start):
                prompt = prompt.removesuffix(tag)
        return prompt


SUPPORTED_TAGS = (ReasoningTags("<think>", "</think>"), ReasoningTags("<seed:think>", "</seed:think>"))


def find_reasoning_tags(chat_template: str) -> ReasoningTags | None:
    """Returns the tags that a chat template uses, or None if its model does not reason."""
    return next((tags for tags in SUPPORTED_TAGS if tags.end in chat_template or tags.start in chat_template), None)


class ReasoningParser:
    """Separates the text of one answer, piece by piece, into reasoning and answer.

    The tags and the white space around them belong to neither.
    """

    def __init__(self, tags: ReasoningTags | None, state: ReasoningState | None) -> None:
        self._tags = tags
        self._stage: Literal["before", "reasoning", "answer"] = "before"
        if tags is None:
            self._stage = "answer"
        elif state == "open":
            self._stage = "reasoning"
        self._pending = ""  # text that may be part of a tag, or white space before a tag
        self._strip = state == "open"  # white space after a tag is dropped

    def add(self, text: str) -> tuple[str, str]:
        """Returns the reasoning and the answer in the next piece of text."""
        self._pending += text
        reasoning = ""
        if self._tags is not None and self._stage == "before":
            begun = self._pending.lstrip()
            if begun.startswith(self._tags.start):
                self._stage, self._pending, self._strip = "reasoning", begun[len(self._tags.start) :], True
            elif begun and not self._tags.start.startswith(begun):
                self._stage = "answer"
            else:
                return "", ""
        if self._tags is not None and self._stage == "reasoning":
            self._strip_start()
            part, end, rest = self._pending.partition(self._tags.end)
            if end:
                self._stage, self._pending, self._strip = "answer", rest, True
                reasoning = part.rstrip()
            else:
                keep = _length_to_hold_back(part, self._tags.end)
                reasoning, self._pending = part[: len(part) - keep], part[len(part) - keep :]
        if self._stage != "answer":
            return reasoning, ""
        self._strip_start()
        answer, self._pending = self._pending, ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """Returns the text that was held back. Call it after the last piece."""
        rest, self._pending = self._pending, ""
        return (rest, "") if self._stage == "reasoning" else ("", rest)

    def _strip_start(self) -> None:
        if self._strip:
            self._pending = self._pending.lstrip()
            self._strip = not self._pending


def _length_to_hold_back(text: str, tag: str) -> int:
    """Returns how many characters at the end of the text may be the beginning of the tag, with the space before it."""
    partial = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
    body = text[: len(text) - partial].rstrip()
    return len(text) - len(body)
