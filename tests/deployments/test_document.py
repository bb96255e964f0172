"""Tests the server with requests generated from its own OpenAPI document."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
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

    Fields that need another field are left out.
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
        for field in fields.keys() & {"top_logprobs", "stream_options", "best_of", "max_completion_tokens"}:
            del fields[field]
        schemas[name]["required"].append("max_tokens")
    schemas["ChatCompletionRequest"]["properties"]["messages"]["maxItems"] = 3
    for name in ("TokenizePromptRequest", "TokenizeChatRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"] = {"enum": [None, MODEL]}
    for name in ("ChatCompletionRequest", "TokenizeChatRequest"):
        for field in ("chat_template_kwargs", "continue_final_message", "tools"):
            del schemas[name]["properties"][field]
        schemas[name]["properties"]["messages"]["items"] = {"$ref": "#/components/schemas/InputMessage"}
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


document, served_here = schemathesis.openapi.from_dict(OPENAPI_DOCUMENT), schemathesis.openapi.from_dict(narrowed())
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
    with served(create_app(LocalBackend(pair.pipeline), ApiSettings(api_keys_file=str(keys)), MODEL)) as address:
        yield address


@document.parametrize()
@SETTINGS
def test_every_response_matches_the_document(case: schemathesis.Case, guarded: str) -> None:
    excluded: list[CheckFunction] = [positive_data_acceptance]  # valid values depend on the model and its limits
    case.call_and_validate(guarded, headers=HEADERS, excluded_checks=excluded)


@served_here.include(method="POST").parametrize()
@SETTINGS
def test_every_request_that_the_document_allows_is_served(case: schemathesis.Case, guarded: str) -> None:
    case.call_and_validate(guarded, headers=HEADERS)
