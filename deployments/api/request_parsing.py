"""Converts the body of an HTTP request to requests to the pipeline.

The body is validated for this model and its settings. `request_models.py` has already validated the fields themselves,
and rejects unsupported ones.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

from deployments.api.best_of import BestOf
from deployments.api.errors import ApiError
from deployments.api.messages import Conversation, join_text_parts
from deployments.api.request_models import (
    BaseCompletionRequest,
    ChatCompletionRequest,
    CompletionRequest,
    StreamOptions,
)
from deployments.api.response_models import DetokenizeResponse, ModelCard, ParseCapabilities, TokenizeResponse
from deployments.api.responses import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    ResponseBuilder,
    ResponseContext,
    generate_id,
)
from deployments.api.token_text import TokenText
from deployments.api.tokenization import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from deployments.config import ApiSettings
from deployments.observability.choice_state import ChoiceState, EchoedPrompt
from deployments.session import Session
from parse.control_tokens import encode_text
from parse.engines.protocol import Capabilities
from parse.errors import RequestError
from parse.pipeline import Pipeline
from parse.prompts import ChatPrompt, Message, chat_prompt, template_mentions, validate_template_kwargs
from parse.reasoning import ReasoningState
from parse.requests import GenerationRequest, session_key
from parse.tool_calls import TOOL_CALL_PARSERS, ToolCallStream, detect_tool_call_parser

DEFAULT_COMPLETION_MAX_TOKENS = 16  # the default of the OpenAI API
NON_STREAM_INTERVAL = 64  # tokens between two deltas of an answer that is not streamed
MAX_INLINE_TOKENIZATION_CHARS = 20_000  # longer texts are tokenized in a thread and do not block other requests


@dataclass(frozen=True)
class ParsedRequest:
    """A validated request with everything that is needed to serve it."""

    generation_requests: Sequence[GenerationRequest]
    choices: Sequence[ChoiceState]
    response_builder: ResponseBuilder
    stream: bool
    include_usage: bool

    @property
    def mode(self) -> str:
        return self.generation_requests[0].mode


@dataclass(frozen=True, kw_only=True)
class RequestInput:
    """The values of a request that the two endpoints find in different fields."""

    prompt_field: str
    prompts: Sequence[Sequence[int]]
    session_key: str
    mode: str
    max_tokens: int | None
    logprobs: int | None
    num_choices: int
    best_of: BestOf | None = None
    include_eos_token: bool = False
    messages: Sequence[Message] = ()
    prediction: Sequence[int] | None = None
    reasoning: ReasoningState | None = None
    echoed_texts: Sequence[str] | None = None
    tool_names: Sequence[str] = ()
    max_tool_calls: int | None = None


class RequestParser:
    """Parses the requests to one model."""

    def __init__(self, pipeline: Pipeline, settings: ApiSettings, model_name: str) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._token_text = TokenText(pipeline.tokenizer)
        self._modes = offered_modes(settings, pipeline.capabilities)
        self._tool_call_parser = settings.tool_call_parser or detect_tool_call_parser(pipeline.tokenizer.chat_template)
        default_thresholds = pipeline.settings.thresholds()
        capabilities = ParseCapabilities(
            modes=list(self._modes),
            full=default_thresholds.full,
            prefix=default_thresholds.prefix,
            lowest_full=settings.min_full,
            lowest_prefix=settings.min_prefix,
            methods=list(pipeline.capabilities.method_choices),
            speculation=pipeline.capabilities.default_method,
        )
        self.model_card = ModelCard(
            id=model_name,
            root=model_name,
            created=int(time.time()),
            max_model_len=pipeline.capabilities.max_model_len,
            parse=capabilities,
        )

    async def parse_chat(self, request: ChatCompletionRequest) -> ParsedRequest:
        self.check_model(request.model)
        self._check_num_choices(request.num_choices)
        tokenizer, messages, effort = self._pipeline.tokenizer, request.to_template_messages(), request.reasoning_effort
        chat = await self._render_chat(request, messages, {"reasoning_effort": effort} if effort else {})
        prediction = None
        if request.prediction is not None:
            text = join_text_parts(request.prediction.content)
            prediction = (await _run_in_thread_if_long(len(text), encode_text, tokenizer, text))[
                : self._pipeline.capabilities.max_model_len
            ]
        request_input = RequestInput(
            prompt_field="messages",
            prompts=[chat.token_ids],
            reasoning=chat.reasoning,
            session_key=request.prompt_cache_key or request.user or _conversation_key(messages),
            mode=request.parse.mode or self._allowed_mode("auto"),
            max_tokens=request.effective_max_tokens,
            logprobs=request.num_logprobs,
            num_choices=request.num_choices,
            # A drafter with its own tokenizer renders them with the header of an answer, and without tools.
            messages=messages if request.can_be_drafted_in_other_tokens else (),
            prediction=prediction,
            tool_names=[tool.function.name for tool in request.offered_tools],
            max_tool_calls=1 if request.parallel_tool_calls is False else None,
        )
        return self._build_parsed_request(request, request_input, ChatResponseBuilder, "chatcmpl")

    async def parse_completion(self, request: CompletionRequest) -> ParsedRequest:
        self.check_model(request.model)
        sent_prompts = request.split_prompts()
        multiplier = "best_of" if request.best_of else "n" if request.num_choices > 1 else "prompt"
        self._check_num_choices(request.num_generated * len(sent_prompts), multiplier)
        adds_special_tokens = request.add_special_tokens is not False
        prompts = [await self._encode_prompt(prompt, adds_special_tokens) for prompt in sent_prompts]
        best_of = None
        if request.num_generated > request.num_choices:
            best_of = BestOf(request.num_generated, request.num_choices, with_logprobs=request.logprobs is not None)
        request_input = RequestInput(
            prompt_field="prompt",
            prompts=prompts,
            session_key=request.user or session_key(prompts[0]),
            mode=request.parse.mode or self._allowed_mode("off"),
            max_tokens=DEFAULT_COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
            logprobs=request.logprobs,
            num_choices=request.num_generated,
            best_of=best_of,
            # As in vLLM: with `max_tokens` 1, evaluation tools expect one entry after those of the prompt.
            include_eos_token=request.logprobs is not None or best_of is not None,
            echoed_texts=[self._prompt_text(prompt) for prompt in sent_prompts] if request.echo else None,
        )
        return self._build_parsed_request(request, request_input, CompletionResponseBuilder, "cmpl")

    async def tokenize(self, request: TokenizePromptRequest | TokenizeChatRequest) -> TokenizeResponse:
        self.check_model(request.model or self.model_card.id)
        tokenizer = self._pipeline.tokenizer
        if isinstance(request, TokenizeChatRequest):
            tokens = (await self._render_chat(request, request.to_template_messages(), {})).token_ids
        else:
            text, add_special_tokens = request.prompt, request.add_special_tokens is not False
            tokens = await _run_in_thread_if_long(len(text), _encode, tokenizer, text, add_special_tokens)
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=self.model_card.max_model_len,
            tokens=tokens,
            token_strs=tokenizer.convert_ids_to_tokens(tokens) if request.return_token_strs else None,
        )

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        self.check_model(request.model or self.model_card.id)
        tokenizer = self._pipeline.tokenizer
        self._check_token_ids("tokens", request.tokens)
        tokens = request.tokens
        return DetokenizeResponse(prompt=await _run_in_thread_if_long(len(tokens), tokenizer.decode, tokens))

    async def _render_chat(
        self, conversation: Conversation, messages: Sequence[Message], defaults: Mapping[str, Any]
    ) -> ChatPrompt:
        """Renders a conversation. The template gets those of the `defaults` that it uses."""
        if conversation.offered_tools and self._tool_call_parser is None:
            raise RequestError("tools", _why_no_tools(self._pipeline.tokenizer))
        tokenizer = self._pipeline.tokenizer
        kwargs = {
            **self._pipeline.chat_template_kwargs,
            **{name: value for name, value in defaults.items() if template_mentions(tokenizer, name)},
            **validate_template_kwargs(tokenizer, conversation.chat_template_kwargs or {}),
        }
        tools = [tool.to_template_tool() for tool in conversation.offered_tools]
        num_chars = len(str(messages)) + len(str(kwargs)) + len(str(tools))
        render = partial(chat_prompt, tokenizer, messages, kwargs, ending=conversation.prompt_ending, tools=tools)
        chat: ChatPrompt = await _run_in_thread_if_long(num_chars, render)
        return chat

    def _check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        if max(token_ids, default=0) >= len(self._pipeline.tokenizer):
            raise RequestError(field, f"token ids must lie in 0..{len(self._pipeline.tokenizer) - 1}")

    def check_model(self, name: str) -> None:
        if name != self.model_card.id:
            message = f"model: must be {self.model_card.id!r}, the model of this server, got {name[:100]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _prompt_text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._pipeline.tokenizer.decode(prompt))

    async def _encode_prompt(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        tokenizer = self._pipeline.tokenizer
        token_ids: list[int] = (
            await _run_in_thread_if_long(len(prompt), _encode, tokenizer, prompt, add_special_tokens)
            if isinstance(prompt, str)
            else list(prompt)
        )
        if not token_ids:
            raise RequestError("prompt", "must not be empty")
        self._check_token_ids("prompt", token_ids)
        return token_ids

    def _build_parsed_request(
        self,
        request: BaseCompletionRequest,
        request_input: RequestInput,
        builder_class: type[ChatResponseBuilder | CompletionResponseBuilder],
        id_prefix: str,
    ) -> ParsedRequest:
        self._check_parse_options(request, request_input.mode)
        self._check_prompt_lengths(request_input)
        seed = random.getrandbits(62) if request.seed is None else request.seed
        stream = bool(request.stream)
        generation_requests: list[GenerationRequest] = []
        choices: list[ChoiceState] = []
        arrival_time = time.time()
        for prompt_index, prompt in enumerate(request_input.prompts):
            echo = _echoed_prompt(request_input, prompt_index)
            for choice_index in range(request_input.num_choices):
                generation_requests.append(
                    self._build_generation_request(request, request_input, prompt, seed + choice_index)
                )
                session = Session(request_input.session_key)
                tool_calls = self._tool_call_stream(request_input)
                choices.append(ChoiceState(len(choices), len(prompt), session, arrival_time, stream, echo, tool_calls))
        context = ResponseContext(
            model=self.model_card.id,
            prompt_lengths=[len(prompt) for prompt in request_input.prompts],
            trace=bool(request.parse.trace),
            stream_options=request.stream_options or StreamOptions(),
            best_of=request_input.best_of,
            id=generate_id(id_prefix),
        )
        response_builder = builder_class(context, self._token_text)
        return ParsedRequest(
            generation_requests, choices, response_builder, stream, bool(context.stream_options.include_usage)
        )

    def _build_generation_request(
        self, request: BaseCompletionRequest, request_input: RequestInput, prompt: Sequence[int], seed: int
    ) -> GenerationRequest:
        settings, pipeline = self._settings, self._pipeline
        logprobs = request_input.logprobs
        if logprobs is None and request_input.best_of is not None:
            logprobs = 0
        sampling_params = request.to_sampling_params(
            seed,
            max_tokens=request_input.max_tokens,
            logprobs=logprobs,
            include_eos_token=request_input.include_eos_token,
        )
        if any(token >= len(pipeline.tokenizer) for token in sampling_params.logit_bias):
            raise RequestError("logit_bias", f"token ids must lie in 0..{len(pipeline.tokenizer) - 1}")
        thresholds = request.resolve_thresholds(
            pipeline.settings.thresholds(), min_full=settings.min_full, min_prefix=settings.min_prefix
        )
        generation_request = GenerationRequest(
            prompt_token_ids=prompt,
            messages=request_input.messages,
            sampling_params=sampling_params,
            mode=request_input.mode,
            thresholds=thresholds,
            prediction=request_input.prediction,
            num_prompt_logprobs=request_input.logprobs if request_input.echoed_texts else None,
            stream_interval=1 if request.stream else NON_STREAM_INTERVAL,
            speculative_method=request.parse.speculation,
            reasoning=request_input.reasoning,
            session_key=request_input.session_key,
        )
        pipeline.capabilities.check(generation_request)
        return generation_request

    def _tool_call_stream(self, request_input: RequestInput) -> ToolCallStream | None:
        if self._tool_call_parser is None or not request_input.tool_names:
            return None
        names, max_calls = request_input.tool_names, request_input.max_tool_calls
        return ToolCallStream(TOOL_CALL_PARSERS[self._tool_call_parser], names, max_calls=max_calls)

    def _check_parse_options(self, request: BaseCompletionRequest, mode: str) -> None:
        modes, methods = self._modes, self._pipeline.capabilities.method_choices
        if mode not in modes:
            raise RequestError("parse.mode", f"must be one of {', '.join(modes)}, got {mode}")
        method = request.parse.speculation
        if method is not None and method not in methods:
            offered = f"must be one of {', '.join(methods)}" if methods else "the server of the target chooses it"
            raise RequestError("parse.speculation", f"{offered}, got {method}")

    def _check_prompt_lengths(self, request_input: RequestInput) -> None:
        max_model_len, max_tokens = self._pipeline.capabilities.max_model_len, request_input.max_tokens
        for prompt in request_input.prompts:
            num_completion_tokens = 1 if max_tokens is None else max_tokens
            if len(prompt) + num_completion_tokens > max_model_len:
                field = request_input.prompt_field
                # Clients recognize this error by OpenAI's wording.
                message = (
                    f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                    f"{len(prompt) + num_completion_tokens} tokens ({len(prompt)} in the {field}, "
                    f"{num_completion_tokens} in the completion). Please reduce the length of the {field} or the "
                    "completion."
                )
                raise ApiError(400, message, param=field, code="context_length_exceeded")

    def _allowed_mode(self, preferred: str) -> str:
        return preferred if preferred in self._modes else self._modes[0]

    def _check_num_choices(self, count: int, field: str = "n") -> None:
        max_choices = min(self._settings.max_n, self._settings.max_answers)
        if count > max_choices:
            raise RequestError(field, f"must request at most {max_choices} answers in total, got {count}")


def offered_modes(settings: ApiSettings, capabilities: Capabilities) -> tuple[str, ...]:
    """Returns the modes of the settings that the engine supports.

    A request may choose among them.

    Raises ValueError if `api.modes` is set and names a mode that the engine does not support.
    """
    supported = tuple(mode for mode in settings.modes if mode == "auto" or mode in capabilities.modes)
    missing = [mode for mode in settings.modes if mode not in supported]
    if missing and "modes" in settings.model_fields_set:
        raise ValueError(f"api.modes: the engine does not support {', '.join(missing)}")
    return supported


async def _run_in_thread_if_long(num_chars: int, function: Any, *args: Any) -> Any:
    """Runs a function on a text, in a thread if the text is long.

    A long text would otherwise block the event loop.
    """
    return function(*args) if num_chars < MAX_INLINE_TOKENIZATION_CHARS else await asyncio.to_thread(function, *args)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _echoed_prompt(request_input: RequestInput, prompt_index: int) -> EchoedPrompt | None:
    if request_input.echoed_texts is None:
        return None
    text, token_ids = request_input.echoed_texts[prompt_index], request_input.prompts[prompt_index]
    return EchoedPrompt(text, token_ids, with_logprobs=request_input.logprobs is not None)


def _why_no_tools(tokenizer: Any) -> str:
    if not template_mentions(tokenizer, "tools"):
        return "the chat template of this model does not support tools"
    return "the server does not recognize how this model calls tools; the operator can set api.tool_call_parser"


def _conversation_key(messages: Sequence[Message]) -> str:
    """Returns a key that all requests of a conversation share.

    It covers the messages up to the first user message.
    """
    user_positions = [position for position, message in enumerate(messages) if message["role"] == "user"]
    end = user_positions[0] + 1 if user_positions else 1
    return _digest(str([(message["role"], message["content"]) for message in messages[:end]]))


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
