"""Reads the settings of a `Pair` from arguments or a file, and loads its models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, field_validator

from parse.config import EngineSettings, VerificationSettings, check_target
from parse.demo import find_demo_model
from parse.engine_config import NativeEngineConfig
from parse.engines import loader
from parse.engines.protocol import Engine
from parse.errors import ModelLoadError, RequestError
from parse.renamed_settings import describe_errors
from parse.settings import Settings

ModelChoice = str | Path | EngineSettings
"""A folder, a Hugging Face id, or the settings of a model."""

SERVICE_SECTIONS = "api", "audit"
"""Sections of a service's configuration that have no meaning in a library."""

WEIGHT_FILES = "*.safetensors", "*.bin"
TOKENIZER_FILES = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"


class PairSettings(Settings):
    """The sections of a configuration that describe a pair."""

    section = "args"

    target: EngineSettings
    draft: EngineSettings | None = None
    verification: VerificationSettings = VerificationSettings()

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: EngineSettings) -> EngineSettings:
        return check_target(target)

    def verification_for_target(self) -> VerificationSettings:
        """Returns the verification settings.

        Those that are not set are taken from the target's folder.
        """
        return VerificationSettings.for_model(self.target.model, **self.verification.model_dump(exclude_unset=True))


def engine_settings(argument: str, model: ModelChoice) -> EngineSettings:
    """Returns the settings of a model that `Pair` was given in the named argument."""
    if isinstance(model, EngineSettings):
        if argument == "target":
            try:
                check_target(model)
            except ValueError as error:
                raise RequestError(argument, str(error)) from error
        return model
    if not isinstance(model, str | Path):
        raise RequestError(argument, f"must be a folder, a Hugging Face id or EngineSettings, got {model!r}")
    if model == "":
        raise RequestError(argument, "must name a model: a folder or a Hugging Face id, got an empty text")
    return EngineSettings(model=str(Path(model).expanduser()) if str(model).startswith("~") else str(model))


def verification_settings(verification: VerificationSettings | None, target: str) -> VerificationSettings:
    """Returns the settings that `Pair` was given, or those in the target's folder."""
    if verification is None:
        try:
            return VerificationSettings.for_model(target)
        except ValueError as error:
            raise model_load_error("target", target, error) from error
    if not isinstance(verification, VerificationSettings):
        raise RequestError("verification", f"must be VerificationSettings, got {verification!r}")
    return verification


def load_engine(argument: str, settings: EngineSettings) -> Engine:
    """Loads a model and starts its engine.

    Errors name the argument and the model in one line.
    """
    check_model_folder(argument, settings.model, has_weights=isinstance(settings.engine, NativeEngineConfig))
    try:
        return loader.load_engine(settings)
    except RequestError as error:
        raise RequestError(f"{argument}.{error.field}", error.message) from error
    except ValueError as error:
        raise model_load_error(argument, settings.model, error) from error


def model_load_error(argument: str, model: str, error: ValueError) -> ModelLoadError:
    """Returns the error of a model that cannot be loaded.

    Keeps only the first line of the cause, because library errors have many lines.
    """
    reason = str(error).partition("\n")[0]
    model = model if model not in reason else ""
    return ModelLoadError(argument, f"{model}: {reason}" if model else reason)


def check_model_folder(argument: str, model: str, *, has_weights: bool = True) -> None:
    """Raises ModelLoadError if the model is a path, but not the folder of a model.

    A server that runs the model has the weights, and only the tokenizer and the configs are needed here.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")) or folder.exists():
            raise ModelLoadError(argument, f"{model} is not a folder")
        return  # a Hugging Face id
    missing = [
        description
        for description, patterns in (
            ("config.json", ("config.json",)),
            ("weights (model.safetensors)", WEIGHT_FILES),
            ("a tokenizer (tokenizer.json)", TOKENIZER_FILES),
        )
        if (has_weights or patterns is not WEIGHT_FILES) and not any(any(folder.glob(name)) for name in patterns)
    ]
    if missing:
        raise ModelLoadError(argument, f"the folder {model} contains no model; it lacks {' and '.join(missing)}")


def read_pair_settings(path: str | Path) -> PairSettings:
    """Reads a file with the keys of `PairSettings`, or a service's configuration.

    If the file configures a service, the first application is used. Relative paths of models are looked up in the
    folder of the file.
    """
    if not isinstance(path, str | Path):
        raise RequestError("path", f"must be the path of a YAML file, got {path!r}")
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError("path", f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        if isinstance(data, Mapping) and "applications" in data:
            data = {key: value for key, value in data["applications"][0]["args"].items() if key not in SERVICE_SECTIONS}
    except (LookupError, TypeError, AttributeError) as error:
        raise RequestError("path", f"{path} has no args in its first application") from error
    try:
        settings = PairSettings.model_validate(data)
    except ValidationError as error:
        raise RequestError("path", f"{path}: {describe_errors(error)}") from error
    folder = Path(path).parent
    draft = _resolve_paths(settings.draft, folder) if settings.draft else None
    return settings.model_copy(update={"target": _resolve_paths(settings.target, folder), "draft": draft})


def _resolve_paths(settings: EngineSettings, folder: Path) -> EngineSettings:
    changes: dict[str, Any] = {
        "model": _resolve_path(settings.model, folder),
        "speculative_configs": tuple(
            config.model_copy(update={"model": config.model and _resolve_path(config.model, folder)})
            for config in settings.speculative_configs
        ),
    }
    return settings.model_copy(update=changes)


def _resolve_path(model: str, folder: Path) -> str:
    path = folder / Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    return str(find_demo_model(model) or model)
