"""The settings that were renamed, and the errors for keys that are not known.

If a configuration still has an old key, the error names the new key. If a key is misspelled, the error suggests the
most similar one.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]
RENAMED_KEY, UNKNOWN_KEY = "renamed_key", "unknown_key"


@dataclass(frozen=True)
class RenamedSetting:
    """A renamed key and its replacement."""

    section: str
    old_name: str
    new_name: str
    conversion: str = ""
    """How the value changes."""


RENAMED_SETTINGS = (
    RenamedSetting("args", "method", "verification"),
    RenamedSetting("target, draft", "threads", "num_threads"),
    RenamedSetting("target, draft", "max_context", "max_model_len"),
    RenamedSetting("target, draft", "memory_mb", "kv_cache_memory_bytes", "multiply by 1048576 (MiB to bytes)"),
    RenamedSetting("target, draft", "max_running", "max_num_seqs"),
    RenamedSetting("target, draft", "step_tokens", "max_num_batched_tokens"),
    RenamedSetting("target, draft", "int8", "quantization", 'write "int8" for true and null for false'),
    RenamedSetting("target, draft", "speculation", "speculative_configs"),
    RenamedSetting("speculative_configs", "head", "model"),
    RenamedSetting("speculative_configs", "tokens", "num_speculative_tokens"),
    RenamedSetting("speculative_configs", "beam", "topk"),
    RenamedSetting("verification", "auto", "auto_mode"),
    RenamedSetting("verification", "check_question", "prompt"),
    RenamedSetting("verification", "places", "prefix_boundaries"),
    RenamedSetting("api", "lowest_full", "min_full"),
    RenamedSetting("api", "lowest_prefix", "min_prefix"),
    RenamedSetting("api", "max_waiting", "max_queued_requests"),
    RenamedSetting("api", "max_choices", "max_n"),
)


def describe_unknown_key(location: str, key: str, valid_keys: Collection[str]) -> str:
    """Returns an error message for an unknown key.

    The message suggests the valid key with the most similar spelling.
    """
    return f"{location} is not known; {suggest_key(key, valid_keys)}"


def describe_errors(error: ValidationError) -> str:
    """Returns all errors in one line, each with its location."""
    messages = []
    for details in error.errors():
        names_its_location = details["type"] in (RENAMED_KEY, UNKNOWN_KEY) or not details["loc"]
        location = "" if names_its_location else f"{format_location(details['loc'])}: "
        messages.append(location + details["msg"])
    return "; ".join(messages)


def format_location(location: Location) -> str:
    """Formats a location, for example `target.speculative_configs[0].model`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")


def explain_unknown_keys(
    error: ValidationError,
    validate: Callable[[Any], object],
    data: object,
    section: str,
    valid_keys: Collection[str],
) -> ValidationError:
    """Returns the error of a section, with an explanation for each unknown key.

    A nested section is validated first and explains its own keys. Each outer section only adds its name to the
    location.
    """
    renamed = {setting.old_name: setting for setting in RENAMED_SETTINGS if setting.section == section}
    explained: list[InitErrorDetails] = []
    for details in error.errors():
        key = str(details["loc"][0]) if details["loc"] else ""
        if details["type"] == "extra_forbidden" and len(details["loc"]) == 1:
            if key in renamed:
                explained.append(_renamed_key(details, (key,), (renamed[key].new_name,), renamed[key].conversion))
                explained += _explain_contents(renamed[key], validate, data)
            else:
                explained.append(_unknown_key(details, suggest_key(key, valid_keys)))
        else:
            explained.append(_repeat(details))
    return ValidationError.from_exception_data(error.title, explained)


def _explain_contents(
    setting: RenamedSetting, validate: Callable[[Any], object], data: object
) -> list[InitErrorDetails]:
    """Returns the errors of the keys inside a renamed section.

    They are reported together with the new name of the section.
    """
    old_name, new_name = setting.old_name, setting.new_name
    if not isinstance(data, Mapping) or new_name in data:
        return []
    try:
        validate({new_name if name == old_name else name: value for name, value in data.items()})
    except ValidationError as error:
        return [
            _repeat(details, old_name=old_name)
            for details in error.errors()
            if details["loc"][:1] == (new_name,) and details["type"] in (RENAMED_KEY, UNKNOWN_KEY)
        ]
    return []


def _repeat(details: ErrorDetails, old_name: str | None = None) -> InitErrorDetails:
    """Returns the error of a nested section with its current location.

    `old_name` replaces the first step of the location.
    """
    location, error_context = details["loc"], details.get("ctx", {})
    old_location = location if old_name is None else (old_name, *location[1:])
    if details["type"] == RENAMED_KEY:
        new_location = (*location[: len(location) - error_context["depth"]], *error_context["new_location"])
        return _renamed_key(details, old_location, new_location, error_context["conversion"])
    if details["type"] == UNKNOWN_KEY:
        return _unknown_key(details | {"loc": old_location}, error_context["suggestion"])
    return InitErrorDetails(type=details["type"], loc=location, input=details["input"], ctx=error_context)


def _renamed_key(
    details: ErrorDetails, location: Location, new_location: Location, conversion: str
) -> InitErrorDetails:
    message = f"{format_location(location)} was renamed to {format_location(new_location)}"
    context = {"depth": len(location), "new_location": new_location, "conversion": conversion}
    error = PydanticCustomError(RENAMED_KEY, message + (f"; {conversion}" if conversion else ""), context)
    return InitErrorDetails(type=error, loc=location, input=details["input"])


def _unknown_key(details: ErrorDetails, suggestion: str) -> InitErrorDetails:
    message = f"{format_location(details['loc'])} is not known; {suggestion}"
    error = PydanticCustomError(UNKNOWN_KEY, message, {"suggestion": suggestion})
    return InitErrorDetails(type=error, loc=details["loc"], input=details["input"])


def suggest_key(key: str, valid_keys: Collection[str]) -> str:
    """Returns a question with the most similar valid key, or else all valid keys."""
    closest = get_close_matches(key, valid_keys, n=1, cutoff=0.5)
    return f"did you mean {closest[0]}?" if closest else f"the keys here are {', '.join(valid_keys)}"
