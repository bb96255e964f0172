"""Drafter and verifier in this process: a pipeline from two models, ready to answer."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerBase

from parse.config import EngineSettings, MethodSettings
from parse.engine.service import ModelService
from parse.engine.text import TextStream
from parse.pipeline import Drafter, Pipeline, Question
from parse.prompts import check_ids, prompt_ids
from parse.types import Tokens

DEMO = Path(__file__).parents[1] / "models"
DEMO_TARGET, DEMO_DRAFT = str(DEMO / "demo-target"), str(DEMO / "demo-draft")


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


class LocalPair:
    """Both models in this process, and the pipeline over them."""

    def __init__(
        self, target: EngineSettings, draft: EngineSettings | None = None, method: MethodSettings | None = None
    ) -> None:
        method = method or MethodSettings.for_model(target.model)
        self.draft: ModelService | None = None
        self.target = ModelService(target)
        try:
            self.draft = ModelService(draft) if draft else None
            self.tokenizer = self.target.model.tokenizer
            check = check_ids(self.tokenizer, method.check_question, method.correct, method.incorrect)
            drafter = drafter_for(self.draft, self.tokenizer) if self.draft else None
        except BaseException:
            self.close()
            raise
        self.pipeline = Pipeline(
            self.target,
            self.tokenizer,
            check,
            method,
            drafter,
            longest=self.target.max_context,
            warms=self.target.model.device.type != "cpu",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for service in (self.target, self.draft):
            if service is not None:
                service.close()


def _last_word(text: str) -> int:
    """Where the last word begins, with the space before it; nothing is certain about a word that may grow."""
    at = len(text.rstrip())
    while at and not text[at - 1].isspace():
        at -= 1
    return max(0, at - 1)
