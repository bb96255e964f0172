"""Models that draft for a target: in its own tokens, or in others, where text is what travels."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from parse.detokenizer import TextStream
from parse.engines.native.service import ModelService
from parse.prompts import prompt_ids
from parse.protocol import Drafter, Question
from parse.types import Tokens


class SameTokens:
    """A drafter that reads and writes the target's tokens."""

    def __init__(self, service: ModelService) -> None:
        self.service = service

    def draft(self, question: Question, output: Sequence[int], *, piece: int) -> AsyncGenerator[Tokens]:
        sampling = replace(question.sampling, logprobs=None)
        return self.service.generate(question.prompt, output, sampling, piece=piece)


class OtherTokens:
    """A drafter with a tokenizer of its own: text travels, cut where a word begins so that no token is torn."""

    def __init__(self, service: ModelService, target: PreTrainedTokenizerBase) -> None:
        self.service, self.target = service, target
        prompt_ids(service.model.tokenizer, [{"role": "user", "content": "Hello."}])  # fails now rather than later

    async def draft(self, question: Question, output: Sequence[int], *, piece: int) -> AsyncGenerator[Tokens]:
        mine = self.service.model.tokenizer
        prompt = prompt_ids(mine, question.messages)
        said = mine.encode(self.target.decode(list(output), skip_special_tokens=True), add_special_tokens=False)
        # Biases name the target's tokens; its token limit is kept by whoever asked.
        sampling = replace(question.sampling, logprobs=None, logit_bias={}, max_tokens=None)
        text, held = TextStream(mine), ""
        async with aclosing(self.service.generate(prompt, said, sampling, piece=piece)) as pieces:
            async for tokens in pieces:
                held += text.add(tokens.ids) + (text.end() if tokens.finish else "")
                border = len(held) if tokens.finish else _last_word(held)
                ids = self.target.encode(held[:border], add_special_tokens=False)
                held = held[border:]
                yield Tokens(tuple(ids), finish=tokens.finish)


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template


def drafter_for(service: ModelService, target: PreTrainedTokenizerBase) -> Drafter:
    return SameTokens(service) if same_tokens(service.model.tokenizer, target) else OtherTokens(service, target)


def _last_word(text: str) -> int:
    """Where the last word begins, with the space before it; nothing is certain about a word that may grow."""
    at = len(text.rstrip())
    while at and not text[at - 1].isspace():
        at -= 1
    return max(0, at - 1)
