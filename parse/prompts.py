"""The words around a draft, in the model's own chat template: the prompt before it, the check question behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from parse.types import RequestError

Message = Mapping[str, str]

ROLES = "system", "user", "assistant"
SENTINEL = "PARSE-SENTINEL"  # ends in a letter, so that no template or tokenizer merges it with what follows

QUESTION = (
    "Check the answer above, which may be unfinished. Is everything in it right so far? For reasoning, check every "
    "step and number; for code, whether a correct program can be completed from it; for an open question, whether it "
    "is accurate and to the point. Do not mind style or that it is unfinished. Reply with one word, Correct or "
    "Incorrect."
)


class TemplateError(ValueError):
    """The chat template or the tokenizer cannot carry the check question."""


@dataclass(frozen=True)
class Check:
    """The question hung behind each prefix, and the tokens that begin its two answers."""

    suffix: tuple[int, ...]  # [end of assistant turn][user: the question][assistant header]
    correct: tuple[int, ...]  # variants of one word, with and without a leading space; the likeliest first
    incorrect: tuple[int, ...]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The conversation up to and including the assistant header."""
    if not messages:
        raise RequestError("messages", "must not be empty")
    for place, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise RequestError(f"messages[{place}].role", f"must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"messages[{place}].content", "must be text")
    return _encoded(tokenizer, _rendered(tokenizer, messages))


def check_ids(
    tokenizer: PreTrainedTokenizerBase,
    question: str = QUESTION,
    correct: str = "Correct",
    incorrect: str = "Incorrect",
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
    if question.strip() not in suffix or SENTINEL in suffix:
        raise TemplateError(f"the chat template does not put the check question once behind the answer: {suffix!r}")
    return _told_apart(tokenizer, suffix, correct, incorrect)


def _told_apart(tokenizer: PreTrainedTokenizerBase, suffix: str, correct: str, incorrect: str) -> Check:
    """The words may be of several tokens: the first by which they differ decides, what they share joins the suffix."""
    asked = _encoded(tokenizer, suffix)
    words = [_continued(tokenizer, suffix, asked, word) for word in (correct, incorrect)]
    shared = 0
    while shared < min(map(len, words)) and words[0][shared] == words[1][shared]:
        shared += 1
    if shared == min(map(len, words)):
        raise TemplateError(f"the answer words {correct!r} and {incorrect!r} begin alike to their end")
    firsts = [[ids[shared]] for ids in words]
    if not shared:
        for first, word in zip(firsts, (correct, incorrect), strict=True):
            first += [_encoded(tokenizer, variant)[0] for variant in (word, f" {word}")]
    variants = [
        tuple(dict.fromkeys(token for token in mine if token == mine[0] or token not in theirs))
        for mine, theirs in (firsts, firsts[::-1])
    ]
    return Check((*asked, *words[0][:shared]), *variants)


def _continued(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], word: str) -> list[int]:
    """The word's ids where it follows the text, or its ids alone if the tokenizer would merge the two."""
    both = _encoded(tokenizer, text + word)
    word_ids = both[len(ids) :] if both[: len(ids)] == ids else _encoded(tokenizer, word)
    if not word_ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in word_ids):
        raise TemplateError(f"the tokenizer cannot write the answer word {word!r}")
    return word_ids


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        raise TemplateError("the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except JinjaError as error:
        raise TemplateError(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
