"""Models that draft for a target: in its own tokens, or in others, where text is what travels."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.service import NativeEngine
from parse.prompts import chat_prompt_token_ids
from parse.protocol import Drafter, GenerationRequest
from parse.types import TokenDelta


class SharedVocabularyDrafter:
    """A drafter that reads and writes the target's tokens."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = engine

    def draft(
        self, request: GenerationRequest, output: Sequence[int], *, stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        sampling = replace(request.sampling_params, logprobs=None)
        return self.engine.generate(request.prompt_token_ids, output, sampling, piece=stream_interval)


class RetokenizingDrafter:
    """A drafter with a tokenizer of its own: text travels, cut where a word begins so that no token is torn."""

    def __init__(self, engine: NativeEngine, target_tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self.target_tokenizer = engine, target_tokenizer
        chat_prompt_token_ids(
            engine.model.tokenizer, [{"role": "user", "content": "Hello."}]
        )  # fails now rather than later

    async def draft(
        self, request: GenerationRequest, output: Sequence[int], *, stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        mine = self.engine.model.tokenizer
        prompt = chat_prompt_token_ids(mine, request.messages)
        said = mine.encode(
            self.target_tokenizer.decode(list(output), skip_special_tokens=True), add_special_tokens=False
        )
        # Biases name the target's tokens; its token limit is kept by whoever asked.
        sampling = replace(request.sampling_params, logprobs=None, logit_bias={}, max_tokens=None)
        text, held = IncrementalDetokenizer(mine), ""
        async with aclosing(self.engine.generate(prompt, said, sampling, piece=stream_interval)) as pieces:
            async for tokens in pieces:
                held += text.add(tokens.token_ids) + (text.finish() if tokens.finish_reason else "")
                border = len(held) if tokens.finish_reason else _last_word_start(held)
                ids = self.target_tokenizer.encode(held[:border], add_special_tokens=False)
                held = held[border:]
                yield TokenDelta(tuple(ids), finish_reason=tokens.finish_reason)


def shares_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template


def drafter_for(engine: NativeEngine, target_tokenizer: PreTrainedTokenizerBase) -> Drafter:
    return (
        SharedVocabularyDrafter(engine)
        if shares_vocabulary(engine.model.tokenizer, target_tokenizer)
        else RetokenizingDrafter(engine, target_tokenizer)
    )


def _last_word_start(text: str) -> int:
    """Where the last word begins, with the space before it; nothing is certain about a word that may grow."""
    at = len(text.rstrip())
    while at and not text[at - 1].isspace():
        at -= 1
    return max(0, at - 1)
