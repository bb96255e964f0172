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
from deployments.api.protocol import (
    BaseCompletionRequest,
    ChatCompletionRequest,
    CompletionRequest,
    ModelCard,
    ParseCapabilities,
    join_text_parts,
)
from deployments.api.responses import (
    ChatResponseBuilder,
    ChoiceState,
    CompletionResponseBuilder,
    ResponseBuilder,
    ResponseContext,
    generate_id,
)
from deployments.api.token_text import TokenText
from deployments.config import ApiSettings
from parse.pipeline import Pipeline
from parse.prompts import chat_prompt_token_ids
from parse.protocol import GenerationRequest, Mode
from parse.types import RequestError

DEFAULT_COMPLETION_MAX_TOKENS = 16  # tokens, as the OpenAI API has it
NON_STREAM_INTERVAL = 64  # tokens between two pieces of an answer that nobody reads along
MAX_INLINE_TOKENIZATION_CHARS = 20_000  # characters, from which tokenizing would hold up the other requests


@dataclass(frozen=True)
class ParsedRequest:
    """A request, understood."""

    generation_requests: Sequence[GenerationRequest]
    choices: Sequence[ChoiceState]
    response_builder: ResponseBuilder
    stream: bool
    include_usage: bool

    @property
    def mode(self) -> Mode:
        return self.generation_requests[0].mode


class RequestParser:
    """Understands requests to one model."""

    def __init__(self, pipeline: Pipeline, settings: ApiSettings, model_name: str) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._token_text = TokenText(pipeline.tokenizer)
        default_thresholds = pipeline.settings.thresholds()
        capabilities = ParseCapabilities(
            modes=list(settings.modes),
            full=default_thresholds.full,
            prefix=default_thresholds.prefix,
            lowest_full=settings.min_full,
            lowest_prefix=settings.min_prefix,
            methods=[*pipeline.capabilities.speculative_methods, "none"],
            speculation=pipeline.capabilities.speculative_methods[0]
            if pipeline.capabilities.speculative_methods
            else "none",
        )
        self.model_card = ModelCard(
            id=model_name,
            created=int(time.time()),
            max_model_len=pipeline.capabilities.max_model_len,
            parse=capabilities,
        )

    async def parse_chat(self, request: ChatCompletionRequest) -> ParsedRequest:
        self.check_model(request.model)
        self._check_num_choices(request.num_choices)
        messages = request.to_template_messages()
        tokenizer = self._pipeline.tokenizer
        prompt = await _run_in_thread_if_long(
            sum(len(message["content"]) for message in messages), chat_prompt_token_ids, tokenizer, messages
        )
        prediction = None
        if request.prediction is not None:
            text = join_text_parts(request.prediction.content)
            prediction = (await _run_in_thread_if_long(len(text), _encode, tokenizer, text))[
                : self._pipeline.capabilities.max_model_len
            ]
        session_key = request.prompt_cache_key or request.user or _conversation_key(messages)
        return self._build_parsed_request(
            request,
            [prompt],
            session_key,
            request.parse.mode or self._allowed_mode("auto"),
            request.effective_max_tokens,
            request.num_logprobs,
            field="messages",
            messages=messages,
            prediction=prediction,
        )

    async def parse_completion(self, request: CompletionRequest) -> ParsedRequest:
        self.check_model(request.model)
        tokenizer = self._pipeline.tokenizer
        prompts = []
        for prompt_input in request.split_prompts():
            token_ids = (
                await _run_in_thread_if_long(len(prompt_input), _encode, tokenizer, prompt_input)
                if isinstance(prompt_input, str)
                else list(prompt_input)
            )
            if not token_ids:
                raise RequestError("prompt", "must not be empty")
            if max(token_ids) >= len(tokenizer):
                raise RequestError("prompt", f"token ids must lie in 0..{len(tokenizer) - 1}")
            prompts.append(token_ids)
        self._check_num_choices(request.num_choices * len(prompts), "n" if request.num_choices > 1 else "prompt")
        mode = request.parse.mode or self._allowed_mode("off")
        max_tokens = DEFAULT_COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        session_key = request.user or _digest(str(prompts[0][:64]))
        return self._build_parsed_request(
            request, prompts, session_key, mode, max_tokens, request.logprobs, field="prompt"
        )

    def _build_parsed_request(
        self,
        request: BaseCompletionRequest,
        prompts: Sequence[Sequence[int]],
        session_key: str,
        mode: Mode,
        max_tokens: int | None,
        logprobs: int | None,
        *,
        field: str,
        messages: Sequence[dict[str, str]] = (),
        prediction: Sequence[int] | None = None,
    ) -> ParsedRequest:
        settings, pipeline = self._settings, self._pipeline
        if mode not in settings.modes:
            raise RequestError("parse.mode", f"must be one of {', '.join(settings.modes)} here, got {mode}")
        speculation, methods = request.parse.speculation, self.model_card.parse.methods
        if speculation is not None and speculation not in methods:
            raise RequestError("parse.speculation", f"must be one of {', '.join(methods)} here, got {speculation}")
        thresholds = request.resolve_thresholds(
            pipeline.settings.thresholds(), lowest_full=settings.min_full, lowest_prefix=settings.min_prefix
        )
        max_model_len = pipeline.capabilities.max_model_len
        for prompt in prompts:
            if max_model_len is not None and len(prompt) + (max_tokens or 1) > max_model_len:
                requested_length = f"{len(prompt)} tokens" + (
                    f" and up to {max_tokens} of an answer" if max_tokens else ""
                )
                message = f"{field}: {requested_length} are more than the {max_model_len} that this model takes"
                raise ApiError(400, message, param=field, code="context_length_exceeded")
        seed = random.getrandbits(62) if request.seed is None else request.seed
        stream = bool(request.stream)
        generation_requests: list[GenerationRequest] = []
        choices: list[ChoiceState] = []
        arrival_time = time.time()
        for prompt in prompts:
            for choice_index in range(request.num_choices):
                sampling_params = request.to_sampling_params(
                    seed + choice_index, max_tokens=max_tokens, logprobs=logprobs
                )
                if any(token >= len(pipeline.tokenizer) for token in sampling_params.logit_bias):
                    raise RequestError("logit_bias", f"token ids must lie in 0..{len(pipeline.tokenizer) - 1}")
                stream_interval = 1 if stream else NON_STREAM_INTERVAL
                generation_requests.append(
                    GenerationRequest(
                        prompt, messages, sampling_params, mode, thresholds, prediction, stream_interval, speculation
                    )
                )
                choices.append(ChoiceState(len(choices), len(prompt), Session(session_key), arrival_time, stream))
        is_chat = field == "messages"
        context = ResponseContext(
            model=self.model_card.id,
            prompt_lengths=[len(prompt) for prompt in prompts],
            trace=request.parse.trace,
            include_usage=request.includes_usage,
            id=generate_id("chatcmpl" if is_chat else "cmpl"),
        )
        response_builder: ResponseBuilder = (ChatResponseBuilder if is_chat else CompletionResponseBuilder)(
            context, self._token_text
        )
        return ParsedRequest(generation_requests, choices, response_builder, stream, request.includes_usage)

    def check_model(self, name: str) -> None:
        if name != self.model_card.id:
            message = f"model: there is no {name[:100]!r} here, but {self.model_card.id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _allowed_mode(self, preferred: Mode) -> Mode:
        return preferred if preferred in self._settings.modes else self._settings.modes[0]

    def _check_num_choices(self, count: int, field: str = "n") -> None:
        max_choices = min(self._settings.max_n, self._settings.max_answers)
        if count > max_choices:
            raise RequestError(field, f"answers to one request are limited to {max_choices}, got {count}")


async def _run_in_thread_if_long(size: int, function: Any, *args: Any) -> Any:
    """In a thread of its own, if there is much of it."""
    return function(*args) if size < MAX_INLINE_TOKENIZATION_CHARS else await asyncio.to_thread(function, *args)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _conversation_key(messages: Sequence[dict[str, str]]) -> str:
    """What all turns of a conversation share: what it began with, up to the first question."""
    user_positions = [position for position, message in enumerate(messages) if message["role"] == "user"]
    end = user_positions[0] + 1 if user_positions else 1
    return _digest(str([(message["role"], message["content"]) for message in messages[:end]]))


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
