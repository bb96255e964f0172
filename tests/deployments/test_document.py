"""Tests the server with requests generated from its own OpenAPI document."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import positive_data_acceptance

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.config import VerificationSettings
from parse.engines.protocol import Capabilities, Verifier
from parse.pair import Pair
from parse.pipeline import Pipeline
from parse.prompts import VerificationSuffix
from parse.registry import MODES
from tests.deployments.conftest import MODEL, SPECULATIVE_CONFIGS
from tests.deployments.live import LocalBackend, served
from tests.deployments.tool_model import with_tool_template
from training.tokenizer import build_tokenizer

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# The document does not depend on the pipeline.
PIPELINE = Pipeline(
    verifier=cast(Verifier, None),
    tokenizer=build_tokenizer(),
    capabilities=Capabilities(tuple(MODES), (), frozenset(), max_logprobs=20, max_model_len=1, block_size=16),
    suffix=VerificationSuffix((), (), ()),
    settings=VerificationSettings(),
)


OPENAPI_DOCUMENT = create_app(LocalBackend(PIPELINE), ApiSettings(), MODEL).openapi()
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def narrowed() -> dict[str, Any]:
    """Returns the document, restricted to the model and the limits of this server.

    Relations between values that a JSON schema cannot express are left out: `best_of` and `n`, the two limits of
    tokens, the role of a last message that is continued, the names of several tools, and the calls that tool messages
    answer.
    """
    openapi_document = deepcopy(OPENAPI_DOCUMENT)
    schemas = openapi_document["components"]["schemas"]
    max_values = {"max_tokens": 3, "max_completion_tokens": 3, "n": 2}
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        fields["model"] = {"const": MODEL}
        for field in fields.keys() & max_values.keys():
            fields[field] = {"type": "integer", "minimum": 1, "maximum": max_values[field]}
        fields["min_tokens"] = {"type": "integer", "minimum": 0, "maximum": 1}
        fields["stop_token_ids"]["anyOf"][0]["items"] = {"type": "integer", "minimum": 0, "maximum": 509}
        fields["logit_bias"]["anyOf"][0]["patternProperties"] = {"^[1-4]?[0-9]$": {"enum": [-100, 0.5, 100]}}
        for field in fields.keys() & {"best_of", "max_completion_tokens"}:
            del fields[field]

        schemas[name]["required"].append("max_tokens")
    schemas["ChatCompletionRequest"]["properties"]["messages"]["maxItems"] = 3
    for name in ("TokenizePromptRequest", "TokenizeChatRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"] = {"enum": [None, MODEL]}
    for name in ("ChatCompletionRequest", "TokenizeChatRequest"):
        fields = schemas[name]["properties"]
        fields["messages"]["items"] = {"$ref": "#/components/schemas/InputMessage"}
        fields["continue_final_message"] = {"enum": [None, False]}
        fields["tools"]["anyOf"][0]["maxItems"] = 1
        fields["chat_template_kwargs"]["anyOf"][0]["propertyNames"] = {"enum": ["enable_thinking", "thinking"]}
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"] = {"type": "integer", "minimum": 0, "maximum": 509}
    for threshold in ("full", "prefix"):
        schemas["ParseOptions"]["properties"][threshold] = {"type": "number", "minimum": 0.5, "maximum": 1}
    schemas["ParseOptions"]["properties"]["speculation"] = {
        "enum": [None, "none", *(config.method for config in SPECULATIVE_CONFIGS)]
    }
    *_, several, tokens, lists = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    tokens["items"] = lists["items"]["items"] = {"type": "integer", "minimum": 0, "maximum": 509}
    several["maxItems"] = lists["maxItems"] = 2
    return openapi_document


NARROWED = narrowed()
document, served_here = schemathesis.openapi.from_dict(OPENAPI_DOCUMENT), schemathesis.openapi.from_dict(NARROWED)
document.config.generation.update(deterministic=True)
served_here.config.generation.update(deterministic=True, modes=[schemathesis.GenerationMode.POSITIVE])


@served_here.hook
def map_body(_: schemathesis.HookContext, body: Any) -> Any:
    """Excludes 1.0, which is a whole number for JSON schemas but not a token id."""
    match body:
        case float() if body.is_integer():
            return int(body)
        case list():
            return [map_body(_, value) for value in body]
        case dict():
            return {name: map_body(_, value) for name, value in body.items()}
    return body


@pytest.fixture(scope="module")
def guarded(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    pipeline = with_tool_template(pair).pipeline
    with served(create_app(LocalBackend(pipeline), ApiSettings(api_keys_file=str(keys)), MODEL)) as address:
        yield address


@document.parametrize()
@SETTINGS
def test_every_response_matches_the_document(case: schemathesis.Case, guarded: str) -> None:
    excluded: list[CheckFunction] = [positive_data_acceptance]  # valid values depend on the model and its limits
    case.call_and_validate(guarded, headers=HEADERS, excluded_checks=excluded)


@served_here.include(method="POST").parametrize()
@SETTINGS
def test_every_request_that_the_document_allows_is_served(case: schemathesis.Case, guarded: str) -> None:
    body = cast(Any, case.body)
    if isinstance(body, dict):
        for field, other in (("top_logprobs", "logprobs"), ("stream_options", "stream")):
            if body.get(field) is not None:
                body[other] = True
    case.call_and_validate(guarded, headers=HEADERS)


def test_the_document_has_the_conditions_of_the_server(guarded: str) -> None:
    """Each field that needs another one is rejected without it, by the server and by the document."""
    chat: dict[str, Any] = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    answer = [*chat["messages"], {"role": "assistant", "content": "Hello"}]
    completion: dict[str, Any] = {"model": MODEL, "max_tokens": 1, "prompt": "Hi"}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ("/v1/chat/completions", chat, {"top_logprobs": 0}, {"logprobs": True}),
        ("/v1/chat/completions", chat, {"stream_options": {}}, {"stream": True}),
        ("/v1/completions", completion, {"stream_options": {}}, {"stream": True}),
        ("/tokenize", {"messages": answer}, {"continue_final_message": True}, {"add_generation_prompt": False}),
    ]
    for path, body, field, needed in cases:
        for change, is_valid in (({}, True), (field, False), (field | needed, True), (dict.fromkeys(field), True)):
            response = httpx.post(f"{guarded}{path}", json=body | change, headers=HEADERS)
            assert (response.status_code == 200) == is_valid, (change, response.text)
            operation = OPENAPI_DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            validator = Draft202012Validator(OPENAPI_DOCUMENT | operation["schema"])
            assert validator.is_valid(body | change) == is_valid, (path, change)


def test_all_limits_are_written_in_the_keywords_of_json_schema() -> None:
    """A limit under another name, such as `ge` of Python, does not reach any client."""
    keywords = {
        *("$ref", "additionalProperties", "allOf", "anyOf", "const", "contains", "default", "description", "enum"),
        *("discriminator", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items", "maximum", "maxItems"),
        *("maxLength", "maxProperties", "minimum", "minItems", "minLength", "not", "oneOf", "pattern"),
        *("patternProperties", "prefixItems", "properties", "propertyNames", "required", "then", "title", "type"),
    }

    def unknown_keywords(schema: Any) -> set[str]:
        if isinstance(schema, list):
            return set[str]().union(*map(unknown_keywords, schema))
        if not isinstance(schema, dict):
            return set()
        nested = [
            list(value.values()) if name in ("properties", "patternProperties") else value
            for name, value in schema.items()
            if name not in ("const", "default", "discriminator", "enum", "required")
        ]
        return (set(schema) - keywords).union(*map(unknown_keywords, nested))

    assert unknown_keywords(list(OPENAPI_DOCUMENT["components"]["schemas"].values())) == set()
