"""What an operator may set: the `args` of an application in serve_config.yaml."""

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, field_validator

from parse.config import EngineSettings, MethodSettings, Settings
from parse.protocol import Mode

HOUSE = Path(__file__).parents[1]


class ApiSettings(Settings):
    """What clients may ask for, and how many of them at once."""

    model_name: str | None = Field(
        None, min_length=1, description="The model's name in the API; the last part of the target's path by default."
    )
    modes: tuple[Mode, ...] = Field(get_args(Mode), min_length=1, description="The modes a request may choose.")
    lowest_full: float = Field(0.5, ge=0, le=1, description="The least a request may set the threshold `full` to.")
    lowest_prefix: float = Field(0.5, ge=0, le=1, description="The least a request may set the threshold `prefix` to.")
    max_answers: int = Field(
        64, ge=1, description="Answers worked on at the same time by one router: the depth of its pipeline."
    )
    max_waiting: int = Field(256, ge=0, description="Requests that may wait for that; further ones get a 503.")
    max_choices: int = Field(16, ge=1, description="The most a request may set `n` to.")
    request_timeout_s: float = Field(600.0, gt=0, description="A request that takes longer fails with 504.")
    max_body_bytes: int = Field(2 * 2**20, ge=1024, description="A request's body may be as long as that.")
    body_timeout_s: float = Field(30.0, gt=0, description="A client that takes longer to send its request gets a 408.")
    api_keys_file: str | None = Field(
        None,
        description="A file of bearer keys, one a line. With keys, every request needs one of them, but those for "
        "/health, /ready, the documents and the playground.",
    )
    api_keys_env: str = Field(
        "PARSE_API_KEYS",
        min_length=1,
        description="The router's environment variable that may hold bearer keys, separated by commas. Without any "
        "keys only clients on this machine are served.",
    )

    @field_validator("modes", mode="before")
    @classmethod
    def _off_is_a_word(cls, modes: Any) -> Any:
        """YAML takes it for false."""
        return ["off" if mode is False else mode for mode in modes] if isinstance(modes, list) else modes


class AuditSettings(Settings):
    """Answers with accepted drafts, asked again of the target alone: the running price of being lossy."""

    share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The share of them that is audited, at moments when its router has nothing else to do.",
    )
    result: str | None = Field(
        None,
        min_length=1,
        description="A regular expression for what counts in an answer: its last match, or the groups of that. Two "
        "answers agree where it is the same. Without one, or where the target's answer has no match, `gap` decides. "
        "For the demo pair it is a number, `\\d+`. It is looked for in the last 2000 characters.",
    )
    gap: float = Field(
        0.5,
        ge=0,
        description="They also agree where the target finds its own answer likelier by no more than that: the mean "
        "log-probability of a token, the difference.",
    )

    @field_validator("result")
    @classmethod
    def _compiles(cls, result: str | None) -> str | None:
        try:
            re.compile(result or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return result


class AppSettings(Settings):
    """The pair, how drafts are judged, and the API. Replicas, autoscaling and resources stand in `deployments`."""

    target: EngineSettings = Field(description="The model whose answers are served.")
    draft: EngineSettings | None = Field(None, description="The model that drafts; null leaves the target alone.")
    method: MethodSettings = Field(
        MethodSettings(), description="What is not set is taken from parse.json beside the target, where there is one."
    )
    api: ApiSettings = Field(ApiSettings(), description="What clients may ask for, and how many of them at once.")
    audit: AuditSettings = Field(AuditSettings(), description="How often the price of being lossy is measured.")

    @property
    def model_name(self) -> str:
        return self.api.model_name or Path(self.target.model).name


def located(model: str) -> str:
    """A path that does not depend on where a process runs, or else the hub's id: our own models lie in the house."""
    for folder in (Path(model).expanduser(), HOUSE / model):
        if folder.is_dir():
            return str(folder.resolve())
    return model
