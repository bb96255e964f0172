"""The options of a call of `Pair`, and how they become a request to the pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerBase

from parse.acceptance import Thresholds
from parse.control_tokens import encode_text
from parse.engines.protocol import Capabilities
from parse.errors import RequestError
from parse.prompts import Message, chat_prompt, validate_template_kwargs
from parse.registry import MODES
from parse.renamed_settings import suggest_key
from parse.requests import GenerationRequest
from parse.types import SamplingParams, validate_token_ids

Prompt = str | Sequence[Message]
"""A user message, or the messages of a conversation as dicts with `role` and `content`."""

SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
ARGUMENT_NAMES = {"speculation": "speculative_method", "messages": "prompt"}
"""Maps the field names of the HTTP API, which errors contain, to the corresponding arguments of `Pair`."""


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `Pair.generate` besides `mode`.

    `stream`, `agenerate` and `astream` take the same arguments. The fields of `SamplingParams` have the defaults of
    that class. They cannot be combined with `sampling_params`.
    """

    thresholds: Thresholds | None
    """By default, the thresholds of the pair's verification settings apply."""
    prediction: str | Sequence[int] | None
    """The expected answer, as text or as tokens of the target. It replaces the draft. Mode `off` uses no draft."""
    prompt_logprobs: int | None
    """Also return the log-probability of each prompt token, with this many alternatives."""
    speculative_method: str | None
    """One of the target's token-level methods, or "none". By default, the first one in its settings is used."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables for the target's chat template, for example `{"enable_thinking": False}`."""
    sampling_params: SamplingParams | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_tokens: int | None
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    include_eos_token: bool
    ignore_eos: bool
    logprobs: int | None


def build_request(
    prompt: Prompt,
    mode: str,
    options: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any],
    capabilities: Capabilities,
    has_drafter: bool,
) -> GenerationRequest:
    """Returns the request for a call.

    Raises RequestError with the name of the invalid argument.
    """
    try:
        for name in options:
            if name not in GenerateOptions.__annotations__:
                names = ("mode", *GenerateOptions.__annotations__)
                raise RequestError(name, f"is not an argument; {suggest_key(name, names)}")
        if not isinstance(mode, str):
            raise RequestError("mode", f"must be one of {', '.join(MODES)}, got {mode!r}")
        messages = _messages(prompt)
        prediction = _prediction_token_ids(options.get("prediction"), tokenizer)
        if mode in MODES and mode != "auto" and MODES[mode].uses_draft and not has_drafter and prediction is None:
            raise RequestError("mode", f"{mode} needs a draft model or a `prediction`, and the pair has no draft model")
        template_kwargs = validate_template_kwargs(tokenizer, options.get("chat_template_kwargs") or {})
        chat = chat_prompt(tokenizer, messages, {**chat_template_kwargs, **template_kwargs})
        request = GenerationRequest(
            prompt_token_ids=chat.token_ids,
            reasoning=chat.reasoning,
            messages=messages,
            sampling_params=_sampling_params(options),
            mode=mode,
            thresholds=_thresholds(options.get("thresholds")),
            prediction=prediction,
            speculative_method=options.get("speculative_method"),
            num_prompt_logprobs=options.get("prompt_logprobs"),
        )
        capabilities.check(request)
        if len(request.prompt_token_ids) >= capabilities.max_model_len:
            length, limit = len(request.prompt_token_ids), capabilities.max_model_len
            raise RequestError("prompt", f"is {length} tokens long; prompt and answer together are limited to {limit}")
    except RequestError as error:
        raise _with_argument_name(error) from error.__cause__
    return request


def _messages(prompt: Prompt) -> Sequence[Message]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RequestError("prompt", "must not be empty")
        _check_unicode("prompt", prompt)
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise RequestError("prompt", f"must be a text or a list of messages, got {prompt!r}")
    if not prompt:
        raise RequestError("prompt", "must not be empty")
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(f"prompt[{index}]", f"must be a dict with role and content, got {message!r}")
        field, content = f"prompt[{index}].content", message["content"]
        if not isinstance(content, str):
            raise RequestError(
                field, f"must be text, got {content!r}; join the texts of a list of parts, and leave out other parts"
            )
        _check_unicode(field, content)
        messages.append(message)
    return messages


def _prediction_token_ids(prediction: object, tokenizer: PreTrainedTokenizerBase) -> Sequence[int] | None:
    if prediction is None:
        return None
    if isinstance(prediction, str):
        _check_unicode("prediction", prediction)
        prediction = encode_text(tokenizer, prediction)
    if not isinstance(prediction, Sequence) or isinstance(prediction, bytes | bytearray):
        raise RequestError("prediction", f"must be a text or token ids, got {prediction!r}")
    if not prediction:
        raise RequestError("prediction", "must not be empty; leave it out to let the draft model write the draft")
    return validate_token_ids("prediction", prediction, len(tokenizer))


def _check_unicode(field: str, text: str) -> None:
    """Raises RequestError for a surrogate, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            field, f"must be valid Unicode; the character {text[error.start]!r} at index {error.start} is a surrogate"
        ) from error


def _sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    values = {name: options[name] for name in SAMPLING_FIELDS if name in options}
    params = options.get("sampling_params")
    if params is None:
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        return SamplingParams(**values)
    if not isinstance(params, SamplingParams):
        raise RequestError("sampling_params", f"must be SamplingParams, got {params!r}")
    if values:
        raise RequestError("sampling_params", f"cannot be combined with {', '.join(values)}; set the fields in it")
    return params


def _thresholds(thresholds: object) -> Thresholds | None:
    if thresholds is None or isinstance(thresholds, Thresholds):
        return thresholds
    raise RequestError("thresholds", f"must be Thresholds, for example Thresholds(full=0.99), got {thresholds!r}")


def _with_argument_name(error: RequestError) -> RequestError:
    for field, argument in ARGUMENT_NAMES.items():
        if error.field == field or error.field.startswith(f"{field}["):
            return RequestError(argument + error.field.removeprefix(field), error.message)
    return error
