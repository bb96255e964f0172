"""The words around a draft, in the model's own chat template: the prompt before it, the check question behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

SENTINEL = "PARSE-SENTINEL"  # ends in a letter, so that no template or tokenizer merges it with what follows


class TemplateError(ValueError):
    """The chat template or the tokenizer cannot carry the check question."""


@dataclass(frozen=True)
class Check:
    """The question hung behind each prefix, and the two tokens that answer it."""

    suffix: tuple[int, ...]  # [end of assistant turn][user: the question][assistant header]
    correct: int
    incorrect: int


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The conversation up to and including the assistant header."""
    return _encoded(tokenizer, _rendered(tokenizer, messages))


def check_ids(
    tokenizer: PreTrainedTokenizerBase, question: str, correct: str = "Correct", incorrect: str = "Incorrect"
) -> Check:
    """The suffix's ids, read off a rendered conversation whose answer is a sentinel."""
    asked = {"role": "user", "content": "Hello."}
    opening = _rendered(tokenizer, [asked])
    answered = [asked, {"role": "assistant", "content": SENTINEL}, {"role": "user", "content": question}]
    before, found, suffix = _rendered(tokenizer, answered).partition(SENTINEL)
    if not found or before != opening:
        raise TemplateError(
            "the chat template does not keep the generation prompt as a prefix of the answered conversation: "
            f"{opening!r} against {before!r}"
        )
    return Check(tuple(_encoded(tokenizer, suffix)), _word(tokenizer, correct), _word(tokenizer, incorrect))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _word(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = _encoded(tokenizer, word)
    if len(ids) != 1:
        raise TemplateError(f"the answer word {word!r} is {len(ids)} tokens, not one")
    return ids[0]
