"""The response bodies of the API.

Names and fields that the OpenAI API has too are spelled as in that API.
"""

from typing import Literal

from pydantic import BaseModel, Field

from parse.config import MethodChoice, MethodName, ModeName


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error in the format of the OpenAI API."""

    error: ErrorInfo


class ParseCapabilities(BaseModel):
    """The values that a request can choose in `parse`, and the defaults."""

    modes: list[ModeName]
    full: float = Field(description="The minimum P(correct) at which a complete draft is accepted.")
    prefix: float = Field(description="The minimum P(correct) at which a prefix passes.")
    lowest_full: float = Field(description="The lowest `full` that a request can set.")
    lowest_prefix: float = Field(description="The lowest `prefix` that a request can set.")
    methods: list[MethodChoice] = Field(
        description="The values that `speculation` can have. The list is empty if the server of the target always "
        "uses a method of its own."
    )
    speculation: MethodChoice | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "parse-serve"
    root: str = Field(description="The same as `id`. Some clients take the name of the tokenizer from here.")
    parent: None = None
    max_model_len: int
    parse: ParseCapabilities


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionResponse(BaseModel):
    version: str


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="The entries of the vocabulary; null unless requested.")


class DetokenizeResponse(BaseModel):
    prompt: str


class StageTimes(BaseModel):
    """When a stage started and ended, in seconds since the request arrived."""

    name: str
    start: float
    end: float


class TracedVerification(BaseModel):
    """The verification of a draft, or of a window of one."""

    start: int = Field(description="The number of answer tokens before the draft or window.")
    cuts: list[int] = Field(description="The lengths of the verified prefixes, in tokens of the draft or window.")
    correct: list[float | None] = Field(description="P(correct) of each prefix; null if it was not evaluated.")
    kept: int = Field(description="The number of accepted tokens.")
    rejected: str = Field(description="The text of the rejected tokens.")


class TracedTextDelta(BaseModel):
    text: str
    origin: Literal["draft", "target"]
    tokens: int


class PositionAcceptance(BaseModel):
    """The proposed tokens of a method at one position of its proposals."""

    proposed: int
    accepted: int
    share: float = Field(description="Accepted over proposed tokens.")


class SpeculationReport(BaseModel):
    """How many of a token-level method's proposals were accepted."""

    method: MethodName
    passes: int = Field(description="Forward passes of the target while it generated, with and without proposals.")
    tokens: int = Field(
        description="Answer tokens from these passes. In mode exact, they include accepted draft tokens."
    )
    tokens_per_pass: float
    proposed: int
    accepted: int
    places: list[PositionAcceptance] = Field(
        description="One item per position in the proposals. The first position is the next token."
    )


class ParseReport(BaseModel):
    """How an answer was made."""

    mode: ModeName
    drafted: int = Field(description="The number of draft tokens.")
    accepted: int
    rejected: int
    written: int = Field(description="The number of tokens that the target generated.")
    rounds: int
    boundary: int | None = Field(description="The number of accepted tokens of the first draft.")
    fallback: str | None = Field(description="Why the target answered without a draft although one was requested.")
    answer_mass: float | None = Field(
        description="The smallest probability of both answer words of the verification together; null without one."
    )
    cached: int = Field(description="The number of prompt tokens that the verifier found in its prefix cache.")
    speculation: SpeculationReport | None = Field(description="Null if no token-level method was used.")
    retries: int = Field(description="The number of calls to a verifier that were lost and repeated.")
    arrived: float = Field(description="When the request arrived, in seconds since 1970.")
    first_s: float
    total_s: float
    stages: list[StageTimes]
    pieces: list[TracedTextDelta] | None = None
    verdicts: list[TracedVerification] | None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    accepted_prediction_tokens: int = Field(description="Accepted draft tokens, from the drafter or from `prediction`.")
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


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it. It may be invalid or incomplete.")


class ChatCompletionToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatCompletionMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Null for an answer that consists of tool calls.")
    tool_calls: list[ChatCompletionToolCall] | None = None
    reasoning_content: str | None = Field(
        None, description="What a reasoning model thought before the answer; null without reasoning."
    )
    refusal: None = None


class ChatCompletionChoice(BaseModel):
    index: int
    message: ChatCompletionMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage
    parse: ParseReport | list[ParseReport] = Field(description="One report, or a list with one per choice.")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
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
    parse: ParseReport | list[ParseReport] = Field(description="One report, or a list with one per choice.")
