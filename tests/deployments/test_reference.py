"""Checks docs/configuration.md and docs/api.md against the code."""

import json
import re
from collections.abc import Iterator
from typing import Literal, get_args

import pytest
import yaml
from annotated_types import MultipleOf
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OfficialChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OfficialCompletion
from pydantic import BaseModel, Field
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from deployments.api.request_models import ChatCompletionRequest, CompletionRequest, ParseOptions
from deployments.api.response_models import (
    ParseCapabilities,
    ParseReport,
    PositionAcceptance,
    SpeculationReport,
    StageTimes,
    TracedTextDelta,
    TracedVerification,
)
from deployments.api.routes import ERROR_DESCRIPTIONS
from deployments.app import assemble
from deployments.config import PROJECT_ROOT, ApiSettings, AppSettings, AuditSettings
from deployments.engine_reference import render_engines_page
from deployments.reference import describe_meaning, describe_type, list_deployments, render_configuration_page
from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
from parse.events import StageName
from parse.registry import METHODS, MODES

HERE = "http://127.0.0.1:8000"
PAGE = PROJECT_ROOT / "docs" / "configuration.md"
MODELS = [AppSettings, EngineSettings, SpeculativeConfig, VerificationSettings, ApiSettings, AuditSettings]


def examples() -> Iterator[str]:
    for part in PAGE.read_text().split("```yaml\n")[1:]:
        yield part.partition("```")[0]


def test_the_page_on_the_configuration_is_up_to_date():
    assert PAGE.read_text() == render_configuration_page(), "python -m deployments.reference > docs/configuration.md"


def test_the_page_on_engines_shows_what_they_declare():
    page = (PROJECT_ROOT / "docs" / "engines.md").read_text()
    assert page == render_engines_page(), "python -m deployments.engine_reference > docs/engines.md"


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_has_a_description_and_is_on_the_page(model):
    for name, field in model.model_fields.items():
        assert len(describe_meaning(field)) > 10, name
        assert f"| `{name}` |" in PAGE.read_text()


def test_types_and_bounds_are_described_in_words():
    class Example(BaseModel):
        plain: str
        complete: int = Field(ge=1)
        share: float = Field(ge=0, le=1)
        above: float | None = Field(gt=0)
        choice: Literal["on", "off"]
        several: tuple[Literal["a", "b"], ...] = Field(min_length=1)
        sections: tuple[SpeculativeConfig, ...]
        odd: int = Field(multiple_of=2)

    descriptions = {name: describe_type(field) for name, field in Example.model_fields.items() if name != "odd"}
    assert descriptions == {
        "plain": "text",
        "complete": "whole number, at least 1",
        "share": "number, 0 to 1",
        "above": "number, above 0, or null",
        "choice": 'one of `"on"`, `"off"`',
        "several": 'list of `"a"`, `"b"`, not empty',
        "sections": "list of sections",
    }
    with pytest.raises(TypeError, match=MultipleOf.__name__):  # an error is better than a missing description
        describe_type(Example.model_fields["odd"])


def test_the_examples_of_the_page_can_be_deployed():
    complete, autoscaling = (yaml.safe_load(example) for example in examples())
    ServeDeploySchema.model_validate(complete)
    AppSettings.model_validate(complete["applications"][0]["args"])
    for deployment in (*complete["applications"][0]["deployments"], *autoscaling["deployments"]):
        DeploymentSchema.model_validate(deployment)
        assert deployment["name"] in ("Router", "Verifier", "Drafter")


def test_limits_on_requests_follow_the_settings_that_the_page_names():
    def limits(**api):
        model = {"model": "m", "max_num_seqs": api.pop("max_num_seqs", 32)}
        settings = AppSettings.model_validate({"target": model, "draft": model, "api": api})
        return {
            deployment.name: deployment.max_ongoing_requests for deployment in list_deployments(assemble(settings)[0])
        }

    default_limits = limits()
    assert limits(max_answers=65)["Router"] == limits(max_queued_requests=257)["Router"] == default_limits["Router"] + 1
    raised_limits = limits(max_num_seqs=33)
    assert (
        raised_limits["Verifier"] > default_limits["Verifier"] and raised_limits["Drafter"] > default_limits["Drafter"]
    )


# docs/api.md is written by hand.

API = (PROJECT_ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize(
    "model",
    [
        ChatCompletionRequest,
        CompletionRequest,
        ParseCapabilities,
        ParseOptions,
        ParseReport,
        PositionAcceptance,
        SpeculationReport,
        StageTimes,
        TracedTextDelta,
        TracedVerification,
    ],
)
def test_the_page_on_the_api_names_every_field(model):
    assert [name for name in model.model_fields if f"`{name}`" not in API and f"`{name}:" not in API] == []


def test_the_page_on_the_api_names_every_rejected_field_of_openai():
    for official, ours in ((OfficialChat, ChatCompletionRequest), (OfficialCompletion, CompletionRequest)):
        refused = official.__annotations__.keys() - ours.model_fields.keys()
        assert [name for name in sorted(refused) if f"`{name}`" not in API] == []


def test_the_page_on_the_api_names_every_mode_stage_and_status():
    names = [*MODES, *get_args(StageName), *METHODS, "none", "queue"]
    assert [name for name in names if f"`{name}`" not in API] == []
    assert [status for status in ERROR_DESCRIPTIONS if isinstance(status, int) and f"| {status} |" not in API] == []


def test_the_python_example_runs(address, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
    assert HERE in example
    exec(compile(example.replace(HERE, address), "docs/api.md", "exec"), {})
    assert re.search(r"\d+ of \d+ drafted tokens accepted, \d+ written by the target", capsys.readouterr().out)


def test_the_shell_commands_of_the_page_work(raw):
    commands = re.findall(rf"curl {HERE}(\S+) .*?-d '(.*?)'\n", API, re.DOTALL)
    assert len(commands) == 2
    for path, body in commands:
        answer = raw.post(path, json=json.loads(body))
        assert answer.status_code == 200, answer.text
        assert answer.json()["parse"]["drafted"] > 0
