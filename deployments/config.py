"""The settings of an operator: the `args` of an application in serve_config.yaml."""

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from parse.config import EngineSettings, ModeName, VerificationSettings, check_target
from parse.demo import find_demo_model
from parse.registry import MODES
from parse.settings import OneOf, Settings
from parse.tool_calls import TOOL_CALL_PARSERS

PROJECT_ROOT = Path(__file__).parents[1]
IS_CHECKOUT = (PROJECT_ROOT / "pyproject.toml").is_file()
"""False if a wheel is installed: `PROJECT_ROOT` is then the folder of all installed packages."""


class ApiSettings(Settings):
    """The limits on what clients may request, and on the number of concurrent requests."""

    section = "api"

    model_name: str | None = Field(
        None,
        min_length=1,
        description="The model's name in the API. With null, it is the last part of the target's path.",
    )
    modes: tuple[ModeName, ...] = Field(tuple(MODES), min_length=1, description="The modes that a request can choose.")
    min_full: float = Field(0.5, ge=0, le=1, description="The lowest threshold `full` that a request can set.")
    min_prefix: float = Field(0.5, ge=0, le=1, description="The lowest threshold `prefix` that a request can set.")
    max_answers: int = Field(
        64, ge=1, description="The maximum number of answers that one router generates at the same time."
    )
    max_queued_requests: int = Field(
        256, ge=0, description="The maximum number of requests that wait in one router. Further requests get a 503."
    )
    max_n: int = Field(
        16,
        ge=1,
        description="The maximum number of choices of a request: `n` times the number of prompts. `max_answers` "
        "applies if it is lower.",
    )
    request_timeout_s: float = Field(
        600.0, gt=0, description="The maximum time of a request, in seconds. A request that takes longer gets a 504."
    )
    max_body_bytes: int = Field(2 * 2**20, ge=1024, description="The maximum size of a request's body, in bytes.")
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        description="The maximum time to send a request, in seconds. A client that takes longer gets a 408.",
    )
    api_keys_file: str | None = Field(
        None,
        description="The path of a file with bearer keys, one per line. If there are keys, every request needs one of "
        "them, except requests for /health, /ready, the API documentation and the playground.",
    )
    tool_call_parser: Annotated[str, OneOf(TOOL_CALL_PARSERS)] | None = Field(
        None,
        description="The format in which the target calls tools. With null, it is taken from what the chat template "
        "shows to the model.",
    )
    ignore_unknown_fields: bool = Field(
        False,
        description="If true, fields of a request that the API does not have are ignored, and the header "
        "`x-ignored-fields` of the response lists them. If false, such a request gets a 400, because an ignored field "
        "could have changed the answer.",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="The origins of web pages whose scripts may use the API in a browser, for example "
        "`https://chat.example`. `*` stands for all origins. Set keys as well: without them, every page of these "
        "origins that is opened on the server's own machine can use the API.",
    )
    api_keys_env: str = Field(
        "PARSE_API_KEYS",
        min_length=1,
        description="The name of an environment variable of the router that can hold more bearer keys, separated by "
        "commas. If there are no keys at all, only clients on the router's own machine are served.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.hostname or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ValueError(f"must be like https://chat.example, without a path, got {origin!r}")
        return origins

    @field_validator("modes", mode="before")
    @classmethod
    def _read_false_as_off(cls, modes: Any) -> Any:
        """Accepts false for the mode off, because YAML reads the word off as false."""
        return ["off" if mode is False else mode for mode in modes] if isinstance(modes, list) else modes


class AuditSettings(Settings):
    """How often audits run, and how they compare answers.

    In an audit, the target alone regenerates an answer that contains accepted drafts, and the two answers are compared.
    This measures how often drafts change results.
    """

    section = "audit"

    share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The share of the answers with accepted drafts that is audited. A router audits only while it has "
        "nothing else to do.",
    )
    result: str | None = Field(
        None,
        min_length=1,
        description="A regular expression that finds the result in an answer. The result is the last match, or the "
        "groups of that match. Two answers agree if their results are the same. Without an expression, or if the "
        "target's answer has no match, `gap` decides. For the demo pair the result is a number, `\\d+`. Only the last "
        "2000 characters of an answer are searched.",
    )
    gap: float = Field(
        0.5,
        ge=0,
        description="The maximum gap in nats, used if there is no result to compare. The gap is the target's mean "
        "log-probability per token of its own answer, minus that of the answer that was sent. Two answers agree if the "
        "gap is at most this value.",
    )

    @field_validator("result")
    @classmethod
    def _check_pattern(cls, result: str | None) -> str | None:
        try:
            re.compile(result or "")
        except re.error as error:
            raise ValueError(f"must be a regular expression: {error}") from error
        return result


class AppSettings(Settings):
    """The two models, the verification and the API.

    Replicas, autoscaling and resources are set in `deployments`.
    """

    section = "args"

    target: EngineSettings = Field(description="The model whose answers are served.")
    draft: EngineSettings | None = Field(
        None, description="The model that writes drafts. With null, the target answers alone."
    )
    verification: VerificationSettings = Field(
        VerificationSettings(),
        description="How drafts are verified. Keys that are not set are taken from parse.json in the target's folder.",
    )
    api: ApiSettings = Field(ApiSettings(), description="The limits on what clients may request.")
    audit: AuditSettings = Field(AuditSettings(), description="How often audits run, and how they compare answers.")

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: EngineSettings) -> EngineSettings:
        return check_target(target)

    @property
    def model_name(self) -> str:
        return self.api.model_name or Path(self.target.model).name


def resolve_model_path(model: str) -> str:
    """Returns the absolute path of a model's folder, or the Hugging Face id as it is.

    Relative paths are looked up in the working directory and then in the checkout. With an installed wheel, the paths
    of the demo models are resolved too. The result is absolute because replicas have another working directory.
    """
    for folder in (Path(model).expanduser(), PROJECT_ROOT / model if IS_CHECKOUT else None, find_demo_model(model)):
        if folder is not None and folder.is_dir():
            return str(folder.resolve())
    return model


def is_local_path(model: str) -> bool:
    """Returns whether the name of a model is a path.

    It is one if it is written like a path or if its parent folder exists.
    """
    parent = model.rpartition("/")[0]
    return (
        model.startswith((".", "/", "~"))
        or parent == "models"
        or (IS_CHECKOUT and bool(parent) and (PROJECT_ROOT / parent).is_dir())
    )
