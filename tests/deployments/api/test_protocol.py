import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OfficialChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OfficialCompletion
from pydantic import ValidationError

from deployments.api.errors import to_validation_error
from deployments.api.reports import aggregate_usage
from deployments.api.request_fields import MAX_INTEGER
from deployments.api.request_models import BaseCompletionRequest, ChatCompletionRequest, CompletionRequest
from deployments.api.response_models import ErrorInfo
from parse.acceptance import Thresholds
from parse.errors import RequestError
from parse.events import Usage
from parse.types import SamplingParams, SpeculationStats

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}
LIMITS = "max_tokens", "max_completion_tokens"
WRONG: list[Any] = [None, True, "x", [], {}]
HALF = "\ud83d"  # one half of a surrogate pair


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"} | fields]}


def parse_body(model: type[BaseCompletionRequest], body: Any) -> Any:
    """Parses a body as the server does, from its JSON text."""
    return model.model_validate(json.loads(json.dumps(body)))


def rejected_error(model: type[BaseCompletionRequest], body: Any) -> ErrorInfo:
    """Returns the error that the client receives."""
    with pytest.raises(ValidationError) as rejected:
        model.model_validate(body)
    errors = [error | {"loc": ("body", *error["loc"])} for error in rejected.value.errors()]
    assert len(errors) < 20, "a long list of faults takes long to make"
    error = to_validation_error(errors)
    assert error.status == 400
    error.to_response()  # the error can be encoded
    return error.body.error


# Valid requests.


def test_missing_and_null_fields_mean_plain_sampling():
    nothing = dict.fromkeys(ChatCompletionRequest.model_fields.keys() - {"model", "messages"})
    for body in (CHAT, CHAT | nothing):
        request = parse_body(ChatCompletionRequest, body)
        assert request.to_sampling_params(7, max_tokens=None, logprobs=None) == SamplingParams(seed=7)
        assert (request.num_choices, request.effective_max_tokens, request.num_logprobs) == (1, None, None)


def test_fields_are_passed_to_the_sampling_parameters():
    fields: dict[str, Any] = dict(
        temperature=0.5,
        top_p=0.25,
        top_k=9,
        min_p=0.125,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        ignore_eos=True,
    )
    request = parse_body(ChatCompletionRequest, CHAT | fields | dict(stop=["a", "b"], logit_bias={"5": -100, "6": 0.5}))
    expected = SamplingParams(
        **fields, stop=("a", "b"), logit_bias={5: -100.0, 6: 0.5}, seed=3, max_tokens=4, logprobs=2
    )
    assert request.to_sampling_params(3, max_tokens=4, logprobs=2) == expected


def test_every_documented_field_at_its_documented_default_is_accepted():
    """As in OpenAI's reference of the chat API. Fields without a default have the value that clients send instead."""
    defaults = dict(
        audio=None,
        frequency_penalty=0,
        function_call="none",
        functions=[],
        logit_bias=None,
        logprobs=False,
        max_completion_tokens=None,
        max_tokens=None,
        metadata={},
        modalities=["text"],
        n=1,
        parallel_tool_calls=True,
        prediction=None,
        presence_penalty=0,
        prompt_cache_key="key",
        prompt_cache_retention=None,
        reasoning_effort="medium",
        response_format={"type": "text"},
        safety_identifier="id",
        seed=None,
        service_tier="auto",
        stop=None,
        store=False,
        stream=True,
        stream_options={"include_obfuscation": True},
        temperature=1,
        tool_choice="none",
        tools=[],
        top_logprobs=None,
        top_p=1,
        user="user",
        verbosity="medium",
        web_search_options=None,
    )
    request = parse_body(ChatCompletionRequest, CHAT | defaults)
    assert request.to_sampling_params(7, max_tokens=None, logprobs=None) == SamplingParams(seed=7)


def test_whole_numbers_may_be_written_as_floats():
    request = parse_body(ChatCompletionRequest, CHAT | dict(n=2.0, max_tokens=5.0, seed=3.0, top_k=4.0))
    assert (request.n, request.max_tokens, request.seed, request.top_k) == (2, 5, 3, 4)
    assert rejected_error(ChatCompletionRequest, CHAT | {"n": 1.5}).param == "n"


def test_a_negative_top_k_means_no_limit():
    request = parse_body(ChatCompletionRequest, CHAT | {"top_k": -1})
    assert request.to_sampling_params(0, max_tokens=None, logprobs=None).top_k == 0


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(None, ()), ("a", ("a",)), ([], ()), ("", ()), (["a", ""], ("a",)), (["a", "bc"], ("a", "bc"))],
)
def test_stop_may_be_a_single_string(stop, expected):
    assert (
        parse_body(ChatCompletionRequest, CHAT | {"stop": stop})
        .to_sampling_params(0, max_tokens=None, logprobs=None)
        .stop
        == expected
    )


def test_whole_numbers_are_accepted_as_numbers():
    assert parse_body(ChatCompletionRequest, CHAT | {"temperature": 1, "top_p": 1}).temperature == 1.0


@pytest.mark.parametrize(
    ("fields", "limit"),
    [({}, None), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 4}, 4), (dict.fromkeys(LIMITS, 5), 5)],
)
def test_the_token_limit_has_two_names(fields, limit):
    assert parse_body(ChatCompletionRequest, CHAT | fields).effective_max_tokens == limit


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3), ({"logprobs": False}, None)],
)
def test_two_fields_request_log_probabilities(fields, expected):
    assert parse_body(ChatCompletionRequest, CHAT | fields).num_logprobs == expected


def test_messages_are_text_and_developer_messages_become_system_messages():
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": ", two"}]
    roles = ["system", "developer", "user", "assistant"]
    request = parse_body(
        ChatCompletionRequest, CHAT | {"messages": [{"role": role, "content": parts} for role in roles]}
    )
    rendered = request.to_template_messages()
    assert [message["role"] for message in rendered] == ["system", "system", "user", "assistant"]
    assert {message["content"] for message in rendered} == {"One, two"}


def test_an_earlier_answer_may_be_sent_back():
    ours: dict[str, Any] = {"role": "assistant", "content": "57.", "refusal": None, "annotations": None, "audio": None}
    ours |= {"function_call": None, "tool_calls": [], "cache_control": {"type": "ephemeral"}}
    request = parse_body(ChatCompletionRequest, CHAT | {"messages": [*CHAT["messages"], ours]})
    assert request.to_template_messages()[1]["content"] == "57."


def test_names_and_empty_answers_are_part_of_the_conversation():
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello", "name": "Kim"},
        {"role": "assistant", "content": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "Bye", "cache_control": {"type": "ephemeral"}}]},
    ]
    request = parse_body(ChatCompletionRequest, CHAT | {"messages": messages})
    assert request.to_template_messages() == [
        {"role": "user", "content": "Hello", "name": "Kim"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Bye"},
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a b", ["a b"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_are_one_or_several_texts_or_token_lists(prompt, expected):
    assert parse_body(CompletionRequest, COMPLETION | {"prompt": prompt}).split_prompts() == expected


def test_a_request_replaces_the_thresholds_that_it_sets_and_no_others():
    defaults = Thresholds(0.9, 0.8)
    for parse, expected in (
        ({}, None),
        ({"full": 0.6}, Thresholds(0.6, 0.8)),
        ({"prefix": 0.7}, Thresholds(0.9, 0.7)),
        ({"full": 0.5, "prefix": 0.5}, Thresholds(0.5, 0.5)),
    ):
        request = parse_body(ChatCompletionRequest, CHAT | {"parse": parse})
        assert request.resolve_thresholds(defaults, min_full=0.5, min_prefix=0.5) == expected


@pytest.mark.parametrize("field", ["full", "prefix"])
def test_thresholds_below_the_operators_minimum_are_rejected(field):
    request = parse_body(ChatCompletionRequest, CHAT | {"parse": {field: 0.49}})
    with pytest.raises(RequestError) as rejected:
        request.resolve_thresholds(Thresholds(), min_full=0.5, min_prefix=0.5)
    assert rejected.value.field == f"parse.{field}" and "0.5" in str(rejected.value)


# Rejected requests, and the field that the error names.


def test_every_field_of_the_official_client_is_served_or_rejected_by_name():
    for ours, body, official in (
        (ChatCompletionRequest, CHAT, OfficialChat),
        (CompletionRequest, COMPLETION, OfficialCompletion),
    ):
        theirs = set(official.__annotations__)
        assert len(theirs & ours.model_fields.keys()) > 10
        for name in theirs - ours.model_fields.keys():
            for value in WRONG:
                error = rejected_error(ours, body | {name: value})
                assert (error.param, error.code) == (name, "unsupported_field")
                assert error.message == f"{name}: is not supported"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"modalities": []}, "modalities"),
        ({"store": "yes"}, "store"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**4000}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"seed": MAX_INTEGER + 1}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": "s" * 257}, "stop"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"logit_bias": {"model": None}}, "logit_bias.model"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks"),
        ({"user": "u" * 513}, "user"),
        ({"prompt_cache_key": 5}, "prompt_cache_key"),
        ({"prediction": "text"}, "prediction"),
        ({"prediction": {"type": "content"}}, "prediction.content"),
        ({"prediction": {"type": "content", "content": [{"type": "image_url"}]}}, "prediction.content[0].type"),
        ({"parse": {"mode": "best"}}, "parse.mode"),
        ({"parse": {"speculation": "eagle"}}, "parse.speculation"),
        ({"parse": {"speculation": True}}, "parse.speculation"),
        ({"parse": {"speculation": ["ngram"]}}, "parse.speculation"),
        ({"parse": {"full": 1.1}}, "parse.full"),
        ({"parse": {"prefix": float("nan")}}, "parse.prefix"),
        ({"parse": {"trace": 1}}, "parse.trace"),
        ({"parse": {"stride": 4}}, "parse.stride"),
        ({"parse": []}, "parse"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": CHAT["messages"] * 4097}, "messages"),
        (message(name="K" * 257), "messages[0].name"),
        (message(role="tool"), "messages[0].tool_call_id"),
        (message(role="tool", tool_call_id="x"), "messages[0].tool_call_id"),
        (message(role="function"), "messages[0].role"),
        (message(content=None), "messages[0].content"),
        (message(content=[]), "messages[0].content"),
        (message(content=[{"type": "input_audio"}]), "messages[0].content[0].type"),
        (message(content=[{"type": "text", "text": 5}]), "messages[0].content[0].text"),
        (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].image_url"),
        (message(refusal="no"), "messages[0].refusal"),
        (message(tool_calls=[{"id": "1"}]), "messages[0].tool_calls"),
        (message(annotations=[{}]), "messages[0].annotations"),
        ({"model": None}, "model"),
        ({"model": ["m"]}, "model"),
        ({"": 1}, "body"),
        ({"a" * 1000: 1}, "a" * 97 + "..."),
        ({"no.such": 1}, "no.such"),
    ],
)
def test_an_invalid_chat_request_is_rejected_with_the_field_name(fields, param):
    error = rejected_error(ChatCompletionRequest, CHAT | fields)
    assert error.param == param and error.type == "invalid_request_error"
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": 1}, "echo"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": []}, "messages"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [[1], [2, "a"]]}, "prompt[1][1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [[1]] * 129}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
    ],
)
def test_an_invalid_completion_request_is_rejected_with_the_field_name(fields, param):
    error = rejected_error(CompletionRequest, COMPLETION | fields)
    assert error.param == param and error.type == "invalid_request_error"
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_missing_field_is_named(name):
    error = rejected_error(ChatCompletionRequest, {key: value for key, value in CHAT.items() if key != name})
    assert error.param == name and "required" in error.message


def test_the_error_of_an_invalid_token_id_states_the_lower_bound():
    assert "greater than or equal to 0" in rejected_error(CompletionRequest, COMPLETION | {"prompt": [-1]}).message


@pytest.mark.parametrize(
    "token", ["", "x", "-1", "1.5", " 5", "5 ", "5\n", "05", "+5", "٣", "1e3", "0x5", "9" * 10, "9" * 5000, "[key]"]
)
def test_keys_of_a_bias_must_be_token_ids(token):
    error = rejected_error(ChatCompletionRequest, CHAT | {"logit_bias": {token: 1}})
    assert error.param is not None and error.param.startswith(f"logit_bias.{token}"[:90]) and len(error.message) < 200


MANY = 50_000


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatCompletionRequest, CHAT | {f"field {index}": 1 for index in range(MANY)}),
        (ChatCompletionRequest, CHAT | {"messages": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"messages": [{f"field {index}": 1 for index in range(40)}] * 4000}),
        (ChatCompletionRequest, CHAT | message(content=[1] * MANY)),
        (ChatCompletionRequest, CHAT | message(content=[{"a": 1}] * MANY)),
        (ChatCompletionRequest, CHAT | {"logit_bias": {str(token): "x" for token in range(MANY)}}),
        (ChatCompletionRequest, CHAT | {"metadata": {str(index): 1 for index in range(MANY)}}),
        (ChatCompletionRequest, CHAT | {"stop": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"tools": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"modalities": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"prediction": {"type": "content", "content": [[]] * MANY}}),
        (CompletionRequest, COMPLETION | {"prompt": [1.5] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": [-1] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": [[]] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": [[1.5] * MANY]}),
        (CompletionRequest, COMPLETION | {"prompt": ["a"] * MANY}),
    ],
)
def test_only_a_few_errors_of_a_faulty_body_are_collected(model, body):
    rejected_error(model, body)  # it checks how many errors were collected


@pytest.mark.parametrize(
    "fields",
    [
        {"model": HALF},
        {HALF: 1},
        {"stop": HALF},
        {"stop": ["a", HALF]},
        {"user": HALF},
        {"prompt_cache_key": HALF},
        {"service_tier": HALF},
        {"logit_bias": {HALF: 1}},
        {"parse": {"mode": HALF}},
        {"parse": {HALF: 1}},
        {"prediction": {"type": "content", "content": HALF}},
        {"prediction": {"type": HALF, "content": ""}},
        message(content=HALF),
        message(role=HALF),
        message(content=[{"type": "text", "text": HALF}]),
        message(content=[{"type": HALF, "text": ""}]),
        message(**{HALF: 1}),
    ],
)
def test_half_a_surrogate_pair_is_rejected_in_every_field(fields):
    error = rejected_error(ChatCompletionRequest, CHAT | fields)
    index = next(iter(fields))
    assert error.param is not None and error.param.startswith(index.encode(errors="replace").decode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    model=st.sampled_from([ChatCompletionRequest, CompletionRequest]),
    field=st.sampled_from(sorted(ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys())),
    value=JSON,
)
def test_any_value_of_a_field_is_accepted_or_named_in_the_error(model, field, value):
    body = (CHAT if model is ChatCompletionRequest else COMPLETION) | {field: value}
    try:
        model.model_validate(body)
    except ValidationError:
        error = rejected_error(model, body)
        assert error.param is not None and error.param.startswith(field)


# Usage.


def test_proposals_of_a_method_do_not_count_as_drafts():
    usage = Usage("off", target_tokens=12, speculation=SpeculationStats("parallel", 4, (4, 4, 4), (4, 3, 1)))
    details = aggregate_usage([5], [12], [usage]).completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)


def test_a_prompt_of_several_choices_counts_once_and_each_answer_counts():
    # There are two prompts of 10 and 20 tokens with two choices each. A choice reuses what the previous one computed.
    usages = [
        Usage("full", draft_tokens=8, accepted_tokens=5, target_tokens=2, cached_tokens=0),
        Usage("full", draft_tokens=4, accepted_tokens=4, target_tokens=0, cached_tokens=9),
        Usage("off", target_tokens=3, cached_tokens=16),
        Usage("off", target_tokens=4, cached_tokens=19),
    ]
    wire = aggregate_usage([10, 20], [7, 4, 3, 4], usages)
    assert (wire.prompt_tokens, wire.completion_tokens, wire.total_tokens) == (30, 18, 48)
    assert wire.prompt_tokens_details.cached_tokens == 0 + 16
    details = wire.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (9, 3)
