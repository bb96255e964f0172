"""PARSE: a small model drafts a complete answer, and a large one verifies it.

The large model verifies many prefixes of the draft in parallel, keeps the accepted prefix, and generates the rest.

    from parse import Pair

    with Pair("path/to/target", "path/to/draft") as pair:
        print(pair.generate("What is 7 times 8?", mode="full"))

The names of this module are imported on first use, so that importing a part of the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parse.acceptance import AcceptancePolicy, Thresholds
    from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
    from parse.demo import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT
    from parse.errors import EngineStopped, ModelLoadError, NumericalError, RequestCancelled, RequestError
    from parse.events import Event, Fallback, Finished, TextDelta, Usage, Verification
    from parse.generation_output import GenerationOutput, Segment
    from parse.options import GenerateOptions
    from parse.pair import Pair
    from parse.registry import MethodSpec, RuleSpec, register_method, register_rule
    from parse.types import SamplingParams

__all__ = [
    "DEMO_DRAFT",
    "DEMO_TARGET",
    "EXAMPLE_PROMPT",
    "AcceptancePolicy",
    "EngineSettings",
    "EngineStopped",
    "Event",
    "Fallback",
    "Finished",
    "GenerateOptions",
    "GenerationOutput",
    "MethodSpec",
    "ModelLoadError",
    "NumericalError",
    "Pair",
    "RequestCancelled",
    "RequestError",
    "RuleSpec",
    "SamplingParams",
    "Segment",
    "SpeculativeConfig",
    "TextDelta",
    "Thresholds",
    "Usage",
    "Verification",
    "VerificationSettings",
    "register_method",
    "register_rule",
]

_MODULES = {
    "parse.acceptance": ("AcceptancePolicy", "Thresholds"),
    "parse.config": ("EngineSettings", "SpeculativeConfig", "VerificationSettings"),
    "parse.demo": ("DEMO_DRAFT", "DEMO_TARGET", "EXAMPLE_PROMPT"),
    "parse.errors": ("EngineStopped", "ModelLoadError", "NumericalError", "RequestCancelled", "RequestError"),
    "parse.events": ("Event", "Fallback", "Finished", "TextDelta", "Usage", "Verification"),
    "parse.generation_output": ("GenerationOutput", "Segment"),
    "parse.options": ("GenerateOptions",),
    "parse.pair": ("Pair",),
    "parse.registry": ("MethodSpec", "RuleSpec", "register_method", "register_rule"),
    "parse.types": ("SamplingParams",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(module), name)
            globals()[name] = value  # the next use does not call this function
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
