"""The OpenAI API's wire format: what a request may hold, as a question; and an answer's events, as what clients expect.

Every field is either served or refused by its name; those listed with a fixed value are accepted with that value only,
because it is what happens anyway.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from parse.acceptance import Thresholds
from parse.protocol import Mode, Usage, Verification
from parse.types import (
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MethodChoice,
    MethodName,
    RequestError,
    SamplingParams,
)

MAX_INTEGER = 9_223_372_036_854_776_000  # as the OpenAI API has it
MAX_LOGIT_BIAS_TOKENS = 1024


def _reject_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("surrogate", "Input should not hold half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_reject_lone_surrogates)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
PromptText = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenIdKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]  # a token id: keys are strings in JSON
BiasValue = Annotated[float, Field(ge=-100, le=100)]


def _check_logit_bias_size(logit_bias: Any) -> Any:
    """Asked before any of them is looked at."""
    if isinstance(logit_bias, dict) and len(logit_bias) > MAX_LOGIT_BIAS_TOKENS:
        raise PydanticCustomError(
            "too_many", "Input should hold at most {most} of them", {"most": MAX_LOGIT_BIAS_TOKENS}
        )
    return logit_bias


LogitBias = Annotated[
    dict[TokenIdKey, BiasValue],
    Field(max_length=MAX_LOGIT_BIAS_TOKENS, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(_check_logit_bias_size),
]


class OpenAIBaseModel(BaseModel):
    """What is wrong is told once: of a body full of it, a list of all faults would take the server seconds."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    printable_name = name.encode(errors="replace").decode()
                    raise PydanticCustomError("unsupported", "is not supported", {"field": printable_name})
        return data


class TextContentPart(OpenAIBaseModel):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextContentPart], Field(min_length=1, fail_fast=True)]


class ChatMessage(OpenAIBaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    # A message of ours, sent back.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(OpenAIBaseModel):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Prediction(OpenAIBaseModel):
    type: Literal["content"]
    content: Content


class TextResponseFormat(OpenAIBaseModel):
    type: Literal["text"]


class ParseOptions(OpenAIBaseModel):
    """How drafts are used for this request, and how the target writes."""

    mode: Mode | None = Field(None, description="The operator's choice by default.")
    speculation: MethodChoice | None = Field(
        None,
        description="By which method the target writes several tokens in a pass; none: one by one. The text is the "
        "same. The operator's choice by default.",
    )
    full: float | None = Field(None, ge=0, le=1, description="P(correct) from which a whole draft is accepted.")
    prefix: float | None = Field(None, ge=0, le=1, description="P(correct) from which a prefix passes.")
    trace: bool = Field(False, description="Tell who wrote which part, what was rejected, and P(correct) at every cut.")


class BaseCompletionRequest(OpenAIBaseModel):
    """What both kinds of request have in common."""

    model: Text = Field(description="As /v1/models names it.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    temperature: float | None = Field(None, ge=0, le=2, description="1 by default; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_INTEGER, description="0, the default, is no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-MAX_INTEGER, le=MAX_INTEGER, description="The same seed gives the same answer.")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    ignore_eos: bool = False
    n: int | None = Field(None, ge=1, le=MAX_INTEGER)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, max_length=512, description="As prompt_cache_key, which comes first.")
    parse: Annotated[ParseOptions, BeforeValidator(lambda value: {} if value is None else value)] = ParseOptions()

    @model_validator(mode="after")
    def _check_stream_options(self) -> "BaseCompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "is for streams only: set stream to true")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def to_sampling_params(self, seed: int, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        explicit_params = {
            name: value
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "ignore_eos",
            )
            if (value := getattr(self, name)) is not None
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return SamplingParams(
            **explicit_params,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=seed,
            stop=tuple(stop),
            max_tokens=max_tokens,
            logprobs=logprobs,
        )

    def resolve_thresholds(self, defaults: Thresholds, *, lowest_full: float, lowest_prefix: float) -> Thresholds:
        for name, value, minimum in (
            ("full", self.parse.full, lowest_full),
            ("prefix", self.parse.prefix, lowest_prefix),
        ):
            if value is not None and value < minimum:
                raise RequestError(f"parse.{name}", f"must be at least {minimum} here, got {value}")
        full, prefix = self.parse.full, self.parse.prefix
        return Thresholds(defaults.full if full is None else full, defaults.prefix if prefix is None else prefix)


class ChatCompletionRequest(BaseCompletionRequest):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prediction: Prediction | None = Field(None, description="A draft of your own, in place of the drafter's.")
    prompt_cache_key: Text | None = Field(
        None, max_length=512, description="Requests with the same key meet the same replica, and its cache."
    )
    # What happens anyway.
    response_format: TextResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _check_field_combinations(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _field_error("top_logprobs", "needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _field_error("max_tokens", "differs from max_completion_tokens, which replaces it")
        return self

    @property
    def effective_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def to_template_messages(self) -> list[dict[str, str]]:
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": join_text_parts(message.content),
            }
            for message in self.messages
        ]


class CompletionRequest(BaseCompletionRequest):
    """POST /v1/completions: text, or tokens, to go on from. There is no turn to judge, so by default none is."""

    prompt: (
        PromptText
        | Annotated[list[PromptText], Field(min_length=1, max_length=128, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # What happens anyway.
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.num_choices:
            raise _field_error("best_of", "is not supported: every answer is returned, so it must equal n")
        return self

    def split_prompts(self) -> list[str | list[int]]:
        prompt_input = self.prompt
        if isinstance(prompt_input, str):
            return [prompt_input]
        if prompt_input and isinstance(prompt_input[0], int):
            return [[token for token in prompt_input if isinstance(token, int)]]
        return [prompt for prompt in prompt_input if not isinstance(prompt, int)]


def join_text_parts(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _field_error(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


# What goes back.


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error, as the OpenAI API shapes it."""

    error: ErrorInfo


class ParseCapabilities(BaseModel):
    """What a request may choose in `parse`, and what holds where it chooses nothing."""

    modes: list[Mode]
    full: float = Field(description="P(correct) from which a whole draft is accepted.")
    prefix: float = Field(description="P(correct) from which a prefix passes.")
    lowest_full: float
    lowest_prefix: float
    methods: list[MethodChoice] = Field(description="What `speculation` may be.")
    speculation: MethodChoice


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "parse-serve"
    max_model_len: int
    parse: ParseCapabilities


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class StageTimes(BaseModel):
    """Seconds since the request arrived."""

    name: str
    start: float
    end: float


class TracedVerification(BaseModel):
    """What was made of a draft, or of a window of one."""

    start: int = Field(description="Tokens of the answer before it.")
    cuts: list[int]
    correct: list[float | None] = Field(description="P(correct) at each cut; null where it was not asked.")
    kept: int
    rejected: str


class TracedTextDelta(BaseModel):
    text: str
    origin: Literal["draft", "target"]
    tokens: int


class PositionAcceptance(BaseModel):
    """Of all proposals of a method, the tokens at one place."""

    proposed: int
    accepted: int
    share: float = Field(description="Accepted of what was proposed.")


class SpeculationReport(BaseModel):
    """What came of writing several tokens in a pass."""

    method: MethodName
    passes: int = Field(description="Of the target, while it wrote; with proposals and without.")
    tokens: int = Field(description="Of the answer, that came of them; in mode exact those of the draft as well.")
    tokens_per_pass: float
    proposed: int
    accepted: int
    places: list[PositionAcceptance] = Field(description="The next token first, then the one behind it, and so on.")


class ParseReport(BaseModel):
    """What happened on the way to the answer."""

    mode: Mode
    drafted: int = Field(description="Tokens.")
    accepted: int
    rejected: int
    written: int = Field(description="Tokens the target wrote itself.")
    rounds: int
    boundary: int | None = Field(description="Tokens of the first draft that were kept.")
    fallback: str | None = Field(description="Why the target answered alone after all.")
    cached: int = Field(description="Tokens of the prompt that its verifier knew already.")
    speculation: SpeculationReport | None = Field(description="Null where the target wrote nothing, or one by one.")
    retries: int = Field(description="Calls to a verifier that were lost with it and made again.")
    arrived: float = Field(description="When the request arrived, in seconds since 1970.")
    first_s: float
    total_s: float
    stages: list[StageTimes]
    pieces: list[TracedTextDelta] | None = None
    verdicts: list[TracedVerification] | None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    accepted_prediction_tokens: int = Field(description="Of the draft, whoever wrote it.")
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatCompletionLogprobs(BaseModel):
    content: list[ChatCompletionTokenLogprob]
    refusal: None = None


class ChatCompletionMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatCompletionChoice(BaseModel):
    index: int
    message: ChatCompletionMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage
    parse: ParseReport | list[ParseReport] = Field(description="One, or with n above 1 one for each choice.")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    parse: ParseReport | list[ParseReport] = Field(description="One, or with several answers one for each.")


def aggregate_usage(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[int], usages: Sequence[Usage]
) -> CompletionUsage:
    """Of all choices together; a prompt that several choices share counts once, as OpenAI counts."""
    prompt_tokens, completion_tokens, choices_per_prompt = (
        sum(prompt_lengths),
        sum(completion_lengths),
        len(usages) // len(prompt_lengths),
    )
    cached_tokens = (
        min(usage.cached_tokens for usage in usages[start : start + choices_per_prompt])
        for start in range(0, len(usages), choices_per_prompt)
    )
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached_tokens)),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=sum(usage.accepted_tokens for usage in usages),
            rejected_prediction_tokens=sum(usage.rejected_tokens for usage in usages),
        ),
    )


def build_speculation_report(usage: Usage) -> SpeculationReport | None:
    speculation = usage.speculation
    if speculation is None:
        return None
    positions = zip(speculation.proposed_per_position, speculation.accepted_per_position, strict=True)
    return SpeculationReport(
        method=speculation.method,
        passes=speculation.passes,
        tokens=usage.decoded_tokens,
        tokens_per_pass=usage.decoded_tokens / speculation.passes,
        proposed=sum(speculation.proposed_per_position),
        accepted=sum(speculation.accepted_per_position),
        places=[
            PositionAcceptance(proposed=proposed, accepted=accepted, share=accepted / proposed)
            for proposed, accepted in positions
        ],
    )


def trace_verification(verification: Verification) -> TracedVerification:
    return TracedVerification(
        start=verification.start,
        cuts=list(verification.prefix_lengths),
        correct=list(verification.p_correct),
        kept=verification.accepted_prefix_length,
        rejected=verification.rejected_text,
    )
