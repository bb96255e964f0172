"""From a request of the API to questions: what it may hold, and what it means here."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from deployments.api.backend import Session
from deployments.api.errors import ApiError
from deployments.api.protocol import ChatRequest, CompletionRequest, ModelCard, Offer, Request, text_of
from deployments.api.responses import Answer, ChatReplies, CompletionReplies, Head, Replies, new_id
from deployments.api.token_text import Vocabulary
from deployments.config import ApiSettings
from parse.pipeline import Pipeline
from parse.prompts import chat_prompt_token_ids
from parse.protocol import GenerationRequest, Mode
from parse.types import RequestError

DEFAULT_COMPLETION = 16  # tokens, as the OpenAI API has it
UNREAD_PIECE = 64  # tokens between two pieces of an answer that nobody reads along
LONG_TEXT = 20_000  # characters, from which tokenizing would hold up the other requests


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    questions: Sequence[GenerationRequest]
    answers: Sequence[Answer]
    replies: Replies
    stream: bool
    totals: bool

    @property
    def mode(self) -> Mode:
        return self.questions[0].mode


class Reader:
    """Understands requests to one model."""

    def __init__(self, pipeline: Pipeline, settings: ApiSettings, model_name: str) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._vocabulary = Vocabulary(pipeline.tokenizer)
        usual = pipeline.settings.thresholds()
        offer = Offer(
            modes=list(settings.modes),
            full=usual.full,
            prefix=usual.prefix,
            lowest_full=settings.lowest_full,
            lowest_prefix=settings.lowest_prefix,
            methods=[*pipeline.methods, "none"],
            speculation=pipeline.methods[0] if pipeline.methods else "none",
        )
        self.card = ModelCard(id=model_name, created=int(time.time()), max_model_len=pipeline.longest or 0, parse=offer)

    async def chat(self, request: ChatRequest) -> Asked:
        self.check_model(request.model)
        self._check_choices(request.choices)
        turns = request.turns()
        tokenizer = self._pipeline.tokenizer
        prompt = await _aside(sum(len(turn["content"]) for turn in turns), chat_prompt_token_ids, tokenizer, turns)
        prediction = None
        if request.prediction is not None:
            text = text_of(request.prediction.content)
            prediction = (await _aside(len(text), _encoded, tokenizer, text))[: self._pipeline.longest]
        key = request.prompt_cache_key or request.user or _beginning(turns)
        return self._asked(
            request,
            [prompt],
            key,
            request.parse.mode or self._usual("auto"),
            request.limit,
            request.wanted_logprobs,
            field="messages",
            messages=turns,
            prediction=prediction,
        )

    async def completion(self, request: CompletionRequest) -> Asked:
        self.check_model(request.model)
        tokenizer = self._pipeline.tokenizer
        prompts = []
        for given in request.prompts():
            ids = await _aside(len(given), _encoded, tokenizer, given) if isinstance(given, str) else list(given)
            if not ids:
                raise RequestError("prompt", "must not be empty")
            if max(ids) >= len(tokenizer):
                raise RequestError("prompt", f"token ids must lie in 0..{len(tokenizer) - 1}")
            prompts.append(ids)
        self._check_choices(request.choices * len(prompts), "n" if request.choices > 1 else "prompt")
        mode = request.parse.mode or self._usual("off")
        limit = DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
        key = request.user or _digest(str(prompts[0][:64]))
        return self._asked(request, prompts, key, mode, limit, request.logprobs, field="prompt")

    def _asked(
        self,
        request: Request,
        prompts: Sequence[Sequence[int]],
        key: str,
        mode: Mode,
        limit: int | None,
        logprobs: int | None,
        *,
        field: str,
        messages: Sequence[dict[str, str]] = (),
        prediction: Sequence[int] | None = None,
    ) -> Asked:
        settings, pipeline = self._settings, self._pipeline
        if mode not in settings.modes:
            raise RequestError("parse.mode", f"must be one of {', '.join(settings.modes)} here, got {mode}")
        speculation, methods = request.parse.speculation, self.card.parse.methods
        if speculation is not None and speculation not in methods:
            raise RequestError("parse.speculation", f"must be one of {', '.join(methods)} here, got {speculation}")
        thresholds = request.thresholds(
            pipeline.settings.thresholds(), lowest_full=settings.lowest_full, lowest_prefix=settings.lowest_prefix
        )
        longest = pipeline.longest
        for prompt in prompts:
            if longest is not None and len(prompt) + (limit or 1) > longest:
                given = f"{len(prompt)} tokens" + (f" and up to {limit} of an answer" if limit else "")
                message = f"{field}: {given} are more than the {longest} that this model takes"
                raise ApiError(400, message, param=field, code="context_length_exceeded")
        seed = random.getrandbits(62) if request.seed is None else request.seed
        stream = bool(request.stream)
        questions: list[GenerationRequest] = []
        answers: list[Answer] = []
        arrived = time.time()
        for prompt in prompts:
            for choice in range(request.choices):
                sampling = request.sampling(seed + choice, max_tokens=limit, logprobs=logprobs)
                if any(token >= len(pipeline.tokenizer) for token in sampling.logit_bias):
                    raise RequestError("logit_bias", f"token ids must lie in 0..{len(pipeline.tokenizer) - 1}")
                piece = 1 if stream else UNREAD_PIECE
                questions.append(
                    GenerationRequest(prompt, messages, sampling, mode, thresholds, prediction, piece, speculation)
                )
                answers.append(Answer(len(answers), len(prompt), Session(key), arrived, stream))
        chat = field == "messages"
        head = Head(
            model=self.card.id,
            prompts=[len(prompt) for prompt in prompts],
            trace=request.parse.trace,
            usage=request.includes_usage,
            id=new_id("chatcmpl" if chat else "cmpl"),
        )
        replies: Replies = (ChatReplies if chat else CompletionReplies)(head, self._vocabulary)
        return Asked(questions, answers, replies, stream, request.includes_usage)

    def check_model(self, name: str) -> None:
        if name != self.card.id:
            message = f"model: there is no {name[:100]!r} here, but {self.card.id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _usual(self, mode: Mode) -> Mode:
        return mode if mode in self._settings.modes else self._settings.modes[0]

    def _check_choices(self, count: int, field: str = "n") -> None:
        most = min(self._settings.max_choices, self._settings.max_answers)
        if count > most:
            raise RequestError(field, f"answers to one request are limited to {most}, got {count}")


async def _aside(size: int, work: Any, *given: Any) -> Any:
    """In a thread of its own, if there is much of it."""
    return work(*given) if size < LONG_TEXT else await asyncio.to_thread(work, *given)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _beginning(turns: Sequence[dict[str, str]]) -> str:
    """What all turns of a conversation share: what it began with, up to the first question."""
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    end = users[0] + 1 if users else 1
    return _digest(str([(turn["role"], turn["content"]) for turn in turns[:end]]))


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
