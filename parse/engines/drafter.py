"""Drafters on any engine.

A draft model has the target's tokenizer or its own.
"""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from parse.control_tokens import encode_text
from parse.detokenizer import IncrementalDetokenizer
from parse.engines.protocol import Drafter, Engine
from parse.errors import RequestError
from parse.prompts import chat_prompt_token_ids
from parse.reasoning import WITHOUT_REASONING
from parse.requests import DraftRequest, GenerateRequest
from parse.types import TokenDelta

EXTRA_TOKENS = 16  # of a draft in another tokenizer, beyond twice the target's token limit

# A word begins with its space, or after a line break. Other whitespace can belong to one token with the characters
# before it, such as ".\n".
_WORD_START = re.compile(r"(?<=\S) (?=\S)|(?<=\n)(?=\S)")


class SharedVocabularyDrafter:
    """A drafter that reads and writes the target's tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        return self.engine.generate(
            GenerateRequest(
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=request.output_token_ids,
                sampling_params=replace(request.sampling_params, logprobs=None),
                stream_interval=request.stream_interval,
                session_key=request.session_key,
            )
        )


class RetokenizingDrafter:
    """A drafter with its own tokenizer.

    The last word is held back until it is complete, so that no token of the target is split.
    """

    def __init__(
        self,
        engine: Engine,
        target_tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.target_tokenizer = engine, target_tokenizer
        # A draft is an answer without reasoning.
        self._template_kwargs = {**(template_kwargs or {}), **WITHOUT_REASONING}
        # This detects a tokenizer without a chat template at load and not with the first request.
        chat_prompt_token_ids(engine.tokenizer, [{"role": "user", "content": "Hello."}], self._template_kwargs)

    async def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        if not request.messages:
            raise RequestError("messages", "a draft model with another tokenizer needs a conversation to answer")
        tokenizer = self.engine.tokenizer
        output = str(self.target_tokenizer.decode(list(request.output_token_ids), skip_special_tokens=True))
        output_token_ids = encode_text(tokenizer, output)
        max_tokens = request.sampling_params.max_tokens
        if max_tokens is not None:
            # The request's limit counts tokens of the target, and the receiver applies it exactly. The limit computed
            # here only ends a draft that does not end by itself. It is higher, because this tokenizer may need more
            # tokens for the same text.
            remaining = max(0, max_tokens - len(request.output_token_ids))
            max_tokens = len(output_token_ids) + 2 * remaining + EXTRA_TOKENS
        generate = GenerateRequest(
            prompt_token_ids=chat_prompt_token_ids(tokenizer, request.messages, self._template_kwargs),
            output_token_ids=output_token_ids,
            # Bias and stop tokens refer to the target's tokens.
            sampling_params=replace(
                request.sampling_params,
                logprobs=None,
                logit_bias={},
                stop_token_ids=(),
                min_tokens=0,  # the receiver counts in the target's tokens
                max_tokens=max_tokens,
            ),
            stream_interval=request.stream_interval,
            session_key=request.session_key,
        )
        detokenizer, pending = IncrementalDetokenizer(tokenizer), ""
        async with aclosing(self.engine.generate(generate)) as deltas:
            async for delta in deltas:
                pending += detokenizer.add(delta.token_ids) + (detokenizer.finish() if delta.finish_reason else "")
                end = len(pending) if delta.finish_reason else _last_word_start(pending)
                token_ids = encode_text(self.target_tokenizer, pending[:end])
                pending = pending[end:]
                yield TokenDelta(tuple(token_ids), finish_reason=delta.finish_reason)


def shares_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template


def drafter_for(
    engine: Engine, target_tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> Drafter:
    if shares_vocabulary(engine.tokenizer, target_tokenizer):
        return SharedVocabularyDrafter(engine)
    return RetokenizingDrafter(engine, target_tokenizer, template_kwargs)


def _last_word_start(text: str) -> int:
    """Returns the character index at which the last word and its space begin.

    The last word may still grow.
    """
    return max((match.start() for match in _WORD_START.finditer(text)), default=0)
