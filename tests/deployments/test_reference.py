"""docs/configuration.md says what the settings say."""

from collections.abc import Iterator
from typing import Literal

import pytest
import yaml
from annotated_types import MultipleOf
from pydantic import BaseModel, Field
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from deployments.app import build
from deployments.config import HOUSE, ApiSettings, AppSettings
from deployments.reference import deployments_of, meaning, page, typed
from parse.config import EngineSettings, MethodSettings

PAGE = HOUSE / "docs" / "configuration.md"
MODELS = [AppSettings, EngineSettings, MethodSettings, ApiSettings]


def examples() -> Iterator[str]:
    for part in PAGE.read_text().split("```yaml\n")[1:]:
        yield part.partition("```")[0]


def test_the_page_is_what_the_settings_make_of_it():
    assert PAGE.read_text() == page(), "python -m deployments.reference > docs/configuration.md"


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_says_what_it_is_for_and_stands_on_the_page(model):
    for name, field in model.model_fields.items():
        assert len(meaning(field)) > 10, name
        assert f"| `{name}` |" in PAGE.read_text()


def test_values_are_named_as_one_writes_them():
    class Example(BaseModel):
        plain: str
        whole: int = Field(ge=1)
        share: float = Field(ge=0, le=1)
        above: float | None = Field(gt=0)
        choice: Literal["on", "off"]
        several: tuple[Literal["a", "b"], ...] = Field(min_length=1)
        odd: int = Field(multiple_of=2)

    said = {name: typed(field) for name, field in Example.model_fields.items() if name != "odd"}
    assert said == {
        "plain": "text",
        "whole": "whole number, at least 1",
        "share": "number, 0 to 1",
        "above": "number, above 0, or null",
        "choice": 'one of `"on"`, `"off"`',
        "several": 'list of `"a"`, `"b"`, not empty',
    }
    with pytest.raises(TypeError, match=MultipleOf.__name__):  # better than a page that is silent about it
        typed(Example.model_fields["odd"])


def test_its_examples_can_be_deployed():
    whole, autoscaling = (yaml.safe_load(example) for example in examples())
    ServeDeploySchema.model_validate(whole)
    AppSettings.model_validate(whole["applications"][0]["args"])
    for deployment in (*whole["applications"][0]["deployments"], *autoscaling["deployments"]):
        DeploymentSchema.model_validate(deployment)
        assert deployment["name"] in ("Router", "Verifier", "Drafter")


def test_limits_on_requests_follow_the_settings_that_the_page_names():
    def limits(**api):
        model = {"model": "m", "max_running": api.pop("max_running", 32)}
        settings = AppSettings.model_validate({"target": model, "draft": model, "api": api})
        return {found.name: found.max_ongoing_requests for found in deployments_of(build(settings))}

    usual = limits()
    assert limits(max_answers=65)["Router"] == limits(max_waiting=257)["Router"] == usual["Router"] + 1
    more = limits(max_running=33)
    assert more["Verifier"] > usual["Verifier"] and more["Drafter"] > usual["Drafter"]
