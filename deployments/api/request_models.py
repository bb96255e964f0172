"""The request bodies of the API.

Every field is either served or rejected with its name.

Some fields have a single allowed value. They are accepted because clients send them, and the value describes what the
server always does.
"""

from dataclasses import fields
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.messages import Content, Conversation
from deployments.api.request_fields import (
    MAX_INTEGER,
    WHOLE_NUMBER,
    LogitBias,
    Metadata,
    NoItems,
    NonNegativeInteger,
    OnlyTrue,
    OpenAIBaseModel,
    PositiveInteger,
    PromptText,
    StopText,
    Text,
    TokenId,
    TokenIds,
    field_error,
)
from parse.acceptance import Thresholds
from parse.config import MethodChoice, ModeName
from parse.errors import RequestError
from parse.types import MAX_LOGPROBS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams


class StreamOptions(OpenAIBaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="Whether each chunk contains the usage of its choice so far. It needs `include_usage`."
    )
    include_obfuscation: bool | None = Field(
        None, description="Whether chunks are filled up to similar lengths, so that their lengths reveal less."
    )


class Prediction(OpenAIBaseModel):
    type: Literal["content"]
    content: Content


class TextResponseFormat(OpenAIBaseModel):
    type: Literal["text"]


class ParseOptions(OpenAIBaseModel):
    """How drafts are used for this request, and how the target generates."""

    mode: ModeName | None = Field(
        None,
        description="How drafts are used. The default is auto for chats and off for "
        "completions, if the operator allows it.",
    )
    speculation: MethodChoice | None = Field(
        None,
        description="The token-level method with which the target generates several tokens per forward pass. With "
        "none, it generates one token per pass. The text is the same. The operator sets the default.",
    )
    full: float | None = Field(None, ge=0, le=1, description="The minimum P(correct) of a complete draft.")
    prefix: float | None = Field(None, ge=0, le=1, description="The minimum P(correct) of a prefix.")
    trace: bool | None = Field(
        None, description="Whether to report the origin of all text, the rejected text, and P(correct) of prefixes."
    )


class BaseCompletionRequest(OpenAIBaseModel):
    """The fields that both endpoints have."""

    REQUIRES: ClassVar = {"stream_options": ("stream", True)}

    model: Text = Field(description="The id that /v1/models lists.")
    max_tokens: PositiveInteger | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="The default is 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER), WHOLE_NUMBER] | None = Field(
        None, description="The default is 0, which means no limit. So does -1."
    )
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER), WHOLE_NUMBER] | None = Field(
        None, description="Requests with the same seed get the same answer."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        None, description="Tokens that end the answer."
    )
    include_stop_str_in_output: bool | None = None
    min_tokens: NonNegativeInteger | None = Field(
        None, description="The answer does not end by itself before it has this many tokens."
    )
    ignore_eos: bool | None = None
    n: PositiveInteger | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(
        None, max_length=512, description="It has the meaning of prompt_cache_key, which takes precedence."
    )
    skip_special_tokens: OnlyTrue | None = None  # what the server always does
    # These fields do not change the answer.
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Text | None = Field(None, max_length=64)
    safety_identifier: Text | None = Field(None, max_length=512)
    prompt_cache_retention: Text | None = Field(None, max_length=64)
    parse: Annotated[ParseOptions, BeforeValidator(lambda value: {} if value is None else value)] = ParseOptions()

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def to_sampling_params(
        self, seed: int, *, max_tokens: int | None, logprobs: int | None, include_eos_token: bool = False
    ) -> SamplingParams:
        """Returns the sampling parameters of a request.

        Some are fields of the same name, others need a conversion.
        """
        explicit_params = {
            field.name: value
            for field in fields(SamplingParams)
            if (value := getattr(self, field.name, None)) is not None
        }
        converted_params = {
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "seed": seed,
            "stop": tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ())),
            "top_k": max(0, self.top_k or 0),
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "include_eos_token": include_eos_token,
        }
        return SamplingParams(**explicit_params | converted_params)

    def resolve_thresholds(self, defaults: Thresholds, *, min_full: float, min_prefix: float) -> Thresholds | None:
        """Returns the thresholds of this request, or None if it sets none of its own."""
        for name, value, minimum in (
            ("full", self.parse.full, min_full),
            ("prefix", self.parse.prefix, min_prefix),
        ):
            if value is not None and value < minimum:
                raise RequestError(f"parse.{name}", f"must be at least {minimum} here, got {value}")
        full, prefix = self.parse.full, self.parse.prefix
        if full is None and prefix is None:
            return None
        return Thresholds(defaults.full if full is None else full, defaults.prefix if prefix is None else prefix)


class ChatCompletionRequest(BaseCompletionRequest, Conversation):
    """POST /v1/chat/completions"""

    REQUIRES: ClassVar = {"top_logprobs": ("logprobs", True)}

    max_completion_tokens: PositiveInteger | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE_NUMBER] | None = None
    prediction: Prediction | None = Field(None, description="Your own draft. It replaces that of the drafter.")
    prompt_cache_key: Text | None = Field(
        None, max_length=512, description="Requests with the same key go to the same replica and its prefix cache."
    )
    reasoning_effort: Text | None = Field(
        None, max_length=64, description="The chat template gets it as a variable, if it uses it."
    )
    # The allowed values of these fields describe what the server always does.
    response_format: TextResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    functions: NoItems | None = None
    audio: None = None
    web_search_options: None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="If false, only the first tool call is returned.")
    # This field does not change the answer.
    verbosity: Text | None = Field(None, max_length=64)

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "ChatCompletionRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise field_error("max_tokens", "must equal max_completion_tokens if both are set")
        return self

    @property
    def effective_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(BaseCompletionRequest):
    """POST /v1/completions: continues text or tokens.

    There is no assistant turn that the target could verify, so the default mode is off.
    """

    prompt: (
        PromptText
        | Annotated[list[PromptText], Field(min_length=1, max_length=128, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    max_tokens: NonNegativeInteger | None = Field(None, description="With 0, nothing is generated.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE_NUMBER] | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer adds its special tokens to a text, such as one at the beginning. "
        "The default is true.",
    )
    echo: bool | None = Field(None, description="Whether the answer begins with the prompt, also in its logprobs.")
    best_of: PositiveInteger | None = Field(
        None, description="How many choices are generated. The `n` most likely ones are returned."
    )
    # The allowed values of this field describe what the server always does.
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.num_choices:
            raise field_error("best_of", f"must be at least n, {self.num_choices}")
        if self.stream and self.num_generated > self.num_choices:
            raise field_error("best_of", "must equal n in a stream, because the best choices are known at the end")
        return self

    @property
    def num_generated(self) -> int:
        """The number of choices that are generated for each prompt."""
        return self.best_of or self.num_choices

    def split_prompts(self) -> list[str | list[int]]:
        prompt_input = self.prompt
        if isinstance(prompt_input, str):
            return [prompt_input]
        if prompt_input and isinstance(prompt_input[0], int):
            return [[token for token in prompt_input if isinstance(token, int)]]
        return [prompt for prompt in prompt_input if not isinstance(prompt, int)]
