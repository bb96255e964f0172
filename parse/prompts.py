"""Renders the prompt of a draft and the verification prompt after it.

Both use the model's own chat template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from parse.errors import RequestError

Message = Mapping[str, str]

ROLES = "system", "user", "assistant"
SENTINEL = "PARSE-SENTINEL"  # ends in a letter, so that no template or tokenizer merges it with what follows

VERIFICATION_PROMPT = (
    "Check the answer above, which may be unfinished. Is everything in it right so far? For reasoning, check every "
    "step and number; for code, whether a correct program can be completed from it; for an open question, whether it "
    "is accurate and to the point. Do not mind style or that it is unfinished. Reply with one word, Correct or "
    "Incorrect."
)


class TemplateError(ValueError):
    """The chat template or the tokenizer does not support the verification prompt."""


@dataclass(frozen=True)
class VerificationSuffix:
    """The tokens that ask the target whether a prefix is correct.

    They are the verification prompt that follows each prefix, and the tokens that begin its two answers.
    """

    token_ids: tuple[int, ...]  # [end of assistant turn][user: verification prompt][assistant header]
    correct_token_ids: tuple[int, ...]  # variants of one word, with and without a leading space; the likeliest first
    incorrect_token_ids: tuple[int, ...]


def chat_prompt_token_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Returns the tokens of a conversation, including the assistant header."""
    if not messages:
        raise RequestError("messages", "must not be empty")
    for place, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise RequestError(f"messages[{place}].role", f"must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"messages[{place}].content", "must be text")
    return _encode(tokenizer, _render(tokenizer, messages))


def build_verification_suffix(
    tokenizer: PreTrainedTokenizerBase,
    verification_prompt: str = VERIFICATION_PROMPT,
    correct: str = "Correct",
    incorrect: str = "Incorrect",
) -> VerificationSuffix:
    """Returns the verification suffix of a chat template.

    The suffix is taken from a rendered conversation whose answer is a sentinel.
    """
    user_message = {"role": "user", "content": "Hello."}
    prompt = _render(tokenizer, [user_message])
    conversation = [
        user_message,
        {"role": "assistant", "content": SENTINEL},
        {"role": "user", "content": verification_prompt},
    ]
    before, separator, suffix = _render(tokenizer, conversation).partition(SENTINEL)
    if not separator or before != prompt:
        raise TemplateError(
            "the chat template does not keep the generation prompt as a prefix of the answered conversation: "
            f"{prompt!r} against {before!r}"
        )
    if verification_prompt.strip() not in suffix or SENTINEL in suffix:
        raise TemplateError(
            f"the chat template does not render the verification prompt exactly once after the answer: {suffix!r}"
        )
    return _distinguishing_tokens(tokenizer, suffix, correct, incorrect)


def _distinguishing_tokens(
    tokenizer: PreTrainedTokenizerBase, suffix: str, correct: str, incorrect: str
) -> VerificationSuffix:
    """Returns the suffix with the tokens that distinguish the two answer words.

    Tokens that both words begin with become part of the suffix. The first tokens that differ are the answers.
    """
    suffix_ids = _encode(tokenizer, suffix)
    words = [_continuation_ids(tokenizer, suffix, suffix_ids, word) for word in (correct, incorrect)]
    shared = 0
    while shared < min(map(len, words)) and words[0][shared] == words[1][shared]:
        shared += 1
    if shared == min(map(len, words)):
        raise TemplateError(
            f"the answer words {correct!r} and {incorrect!r} begin alike: one is the beginning of the other"
        )
    first_tokens = [[ids[shared]] for ids in words]
    if not shared:
        for first, word in zip(first_tokens, (correct, incorrect), strict=True):
            first += [_encode(tokenizer, variant)[0] for variant in (word, f" {word}")]
    variants = [
        tuple(dict.fromkeys(token for token in mine if token == mine[0] or token not in theirs))
        for mine, theirs in (first_tokens, first_tokens[::-1])
    ]
    return VerificationSuffix((*suffix_ids, *words[0][:shared]), *variants)


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], word: str) -> list[int]:
    """Returns the token ids of a word after a text.

    If the tokenizer would merge the two, these are the ids of the word alone.
    """
    both = _encode(tokenizer, text + word)
    word_ids = both[len(ids) :] if both[: len(ids)] == ids else _encode(tokenizer, word)
    if not word_ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in word_ids):
        raise TemplateError(f"the tokenizer has no tokens for the answer word {word!r}")
    return word_ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        raise TemplateError("the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except JinjaError as error:
        raise TemplateError(f"the chat template rejects the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
