"""Renders conversations, and the verification prompt that follows a draft.

Both use the model's own chat template.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError as JinjaError
from jinja2.defaults import DEFAULT_NAMESPACE
from transformers import PreTrainedTokenizerBase

from parse.control_tokens import control_tokens
from parse.errors import RequestError
from parse.reasoning import WITHOUT_REASONING, ReasoningState, ReasoningTags, find_reasoning_tags

Message = Mapping[str, Any]

SPECIAL_TOKENS_ATTRIBUTES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
# Names that the rendering, the library or Jinja define. A client must not replace them.
RESERVED_TEMPLATE_KWARGS = frozenset(
    (
        *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
        *SPECIAL_TOKENS_ATTRIBUTES,
        *DEFAULT_NAMESPACE,
        *("messages", "raise_exception", "strftime_now", "tojson"),
    )
)
ROLES = "system", "user", "assistant", "tool"
SENTINEL = "PARSE-SENTINEL"  # ends in a letter, so that no template or tokenizer merges it with what follows

VERIFICATION_PROMPT = "Correct or Incorrect so far?"
"""It is short, because each prefix is followed by it. It names both answers, so that the target uses these words."""


PromptEnding = Literal["assistant_header", "unfinished_message", "last_message"]
"""How a rendered conversation ends. An unfinished message is the last message without the end of its turn."""


class TemplateError(ValueError):
    """The chat template or the tokenizer does not support the verification prompt."""


@dataclass(frozen=True)
class VerificationSuffix:
    """The tokens that ask the target whether a prefix is correct.

    These are the tokens of the verification prompt that follow each prefix, and the tokens that begin the two possible
    answers.
    """

    token_ids: tuple[int, ...]  # [end of assistant turn][user: verification prompt][assistant header]
    correct_token_ids: tuple[int, ...]  # variants of one word, with and without a leading space; the likeliest first
    incorrect_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation, including the assistant header."""

    token_ids: list[int]
    reasoning: ReasoningState


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    ending: PromptEnding = "assistant_header",
    tools: Sequence[Mapping[str, Any]] = (),
) -> ChatPrompt:
    """Renders a conversation. `template_kwargs` are passed to the chat template, for example `enable_thinking`.

    If `enable_thinking` is false and the template opens a reasoning block nevertheless, the block is closed.
    """
    if not messages:
        raise RequestError("messages", "must not be empty")
    for place, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise RequestError(f"messages[{place}].role", f"must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"messages[{place}].content", "must be text")
    kwargs = {**(template_kwargs or {}), **({"tools": list(tools)} if tools else {})}
    if tools and not template_mentions(tokenizer, "tools"):
        raise RequestError("tools", "the model's chat template does not support tools")
    if ending == "unfinished_message" and not messages[-1]["content"].strip():
        raise RequestError(f"messages[{len(messages) - 1}].content", "must not be empty if it is to be continued")
    control = control_tokens(tokenizer)
    try:
        marked_messages, marked_kwargs = control.mark([messages, kwargs])
        harmless_messages, harmless_kwargs = control.without_control_tokens([messages, kwargs])
    except RecursionError as error:
        raise RequestError("messages", "must not be nested deeply") from error
    text, reasoning = _render_for_reasoning(tokenizer, marked_messages, marked_kwargs, ending)
    if (harmless_messages, harmless_kwargs) != (messages, kwargs):
        harmless_text = _render(tokenizer, harmless_messages, harmless_kwargs, ending)
        if control.count(text) > control.count(harmless_text):
            raise RequestError("messages", "must not contain text from which the chat template makes control tokens")
    return ChatPrompt(control.encode(text), reasoning)


def _render_for_reasoning(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: Mapping[str, Any],
    ending: PromptEnding,
) -> tuple[str, ReasoningState]:
    text = _render(tokenizer, messages, kwargs, ending)
    tags = reasoning_tags(tokenizer)
    if tags is None:
        return text, "none"
    if ending != "assistant_header":
        return text, "open" if text.rfind(tags.start) > text.rfind(tags.end) else "none"
    if _switches_reasoning_off(tokenizer, kwargs):
        return tags.close(text), "none"
    if tags.is_open(text):
        return text, "open"
    # If the template changes when reasoning is switched off, the model decides by itself to begin with it.
    decides = _render(tokenizer, messages, {**kwargs, **WITHOUT_REASONING}) != text
    return text, "expected" if decides else "none"


def validate_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: object) -> dict[str, Any]:
    """Returns the variables for a chat template.

    Raises RequestError for variables that the template does not use, and for names that the rendering itself uses,
    which would replace the template or the conversation. The switches for reasoning are accepted with every template,
    because some clients always send them.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise RequestError("chat_template_kwargs", f"must map names to values, got {kwargs!r}")
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & set(kwargs)):
        raise RequestError("chat_template_kwargs", f"must not contain {', '.join(reserved)}")
    try:
        json.dumps(kwargs)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            "chat_template_kwargs", f"must hold JSON values that are not nested deeply: {error}"
        ) from error
    for name in kwargs:
        if name not in ("enable_thinking", "thinking") and not (
            name.isidentifier() and template_mentions(tokenizer, name)
        ):
            raise RequestError("chat_template_kwargs", f"the model's chat template does not use {name[:100]!r}")
    return dict(kwargs)


def template_mentions(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template contains a name."""
    return bool(re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)))


def _switches_reasoning_off(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> bool:
    """Whether the variables ask for an answer without reasoning.

    If the template uses one of the switches, only those that it uses count.
    """
    used = [name for name in WITHOUT_REASONING if template_mentions(tokenizer, name)] or list(WITHOUT_REASONING)
    effective = [name for name in used if name in kwargs]
    return bool(effective) and all(kwargs[name] == WITHOUT_REASONING[name] for name in effective)


def chat_prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Returns the tokens of a conversation, including the assistant header."""
    return chat_prompt(tokenizer, messages, template_kwargs).token_ids


def reasoning_tags(tokenizer: PreTrainedTokenizerBase) -> ReasoningTags | None:
    """Returns the tags of the chat template, or None if its model does not reason."""
    return find_reasoning_tags(str(tokenizer.chat_template or ""))


def visible_reasoning_tags(tokenizer: PreTrainedTokenizerBase) -> ReasoningTags | None:
    """Returns the tags, or None if they are special tokens, which decoding removes."""
    tags = reasoning_tags(tokenizer)
    return None if tags is None or {tags.start, tags.end} & set(tokenizer.all_special_tokens) else tags


def build_verification_suffix(
    tokenizer: PreTrainedTokenizerBase,
    verification_prompt: str = VERIFICATION_PROMPT,
    correct: str = "Correct",
    incorrect: str = "Incorrect",
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> VerificationSuffix:
    """Returns the verification suffix of a chat template.

    The suffix is taken from a rendered conversation whose answer is a sentinel. It is rendered without reasoning, and a
    reasoning block that the template opens before the reply is closed, because the next token has to be the answer
    word.
    """
    kwargs = {**(template_kwargs or {}), **WITHOUT_REASONING}
    tags = reasoning_tags(tokenizer)
    user_message = {"role": "user", "content": "Hello."}
    prompt = _render(tokenizer, [user_message], kwargs)
    conversation = [
        user_message,
        {"role": "assistant", "content": SENTINEL},
        {"role": "user", "content": verification_prompt},
    ]
    before, separator, suffix = _render(tokenizer, conversation, kwargs).partition(SENTINEL)
    if tags is not None:  # a template may leave out the reasoning of earlier answers
        prompt, before = tags.without_trailing_block(prompt), tags.without_trailing_block(before)
        suffix = tags.close(suffix)
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


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    ending: PromptEnding = "assistant_header",
) -> str:
    if not tokenizer.chat_template:
        raise TemplateError("the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=ending == "assistant_header",
            continue_final_message=ending == "unfinished_message",
            **template_kwargs,
        )
        assert isinstance(text, str)
        text.encode()
    except (JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # A variable of a client may have a value that the template cannot use.
        raise TemplateError(f"the chat template rejects the conversation: {error}") from error
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
