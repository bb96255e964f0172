"""The registry of everything that is chosen by name: the modes and the token-level speculative methods.

Settings, HTTP API, metrics and documentation read their choices from this module. To add a mode or a method, write
its module and add an entry here. An entry names its function by path, and the module is imported on first use, so
this table imports none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class ModeSpec:
    """A mode, that is, a way to use drafts. `auto` selects one of the others and has no function."""

    description: str
    function: str | None
    uses_draft: bool = True
    keeps_distribution: bool = False
    """Whether the output has the target's own distribution for every draft."""


@dataclass(frozen=True)
class MethodSpec:
    """A method that proposes several of the target's next tokens. It does not change the output."""

    description: str
    loader: str
    model: Literal["required", "optional", "none"]
    """Whether the method needs its own checkpoint."""
    supports_trees: bool = False
    is_sequential: bool = False
    """Whether each further token of a proposal takes another step of the method."""


MODES: Mapping[str, ModeSpec] = {
    "auto": ModeSpec("The mode of the setting `auto` while drafting pays, else `off`.", None),
    "full": ModeSpec("Verify the whole draft at once.", "parse.modes.full:run"),
    "progressive": ModeSpec(
        "Verify windows of the draft while the next one is drafted.", "parse.modes.progressive:run"
    ),
    "rounds": ModeSpec("After a correction by the target, draft again.", "parse.modes.rounds:run"),
    "exact": ModeSpec(
        "Accept the draft token by token; the output is the target's own.",
        "parse.modes.exact:run",
        keeps_distribution=True,
    ),
    "off": ModeSpec("The target alone.", "parse.modes.off:run", uses_draft=False, keeps_distribution=True),
}

METHODS: Mapping[str, MethodSpec] = {
    "draft_model": MethodSpec(
        "a small model beside the target",
        "parse.speculative.proposers.draft_model:load",
        model="required",
        is_sequential=True,
    ),
    "ngram": MethodSpec(
        "what followed the same tokens before",
        "parse.speculative.proposers.ngram:load",
        model="none",
    ),
    "eagle3": MethodSpec(
        "a trained EAGLE-3 head",
        "parse.speculative.proposers.eagle3:load",
        model="required",
        supports_trees=True,
        is_sequential=True,
    ),
    "parallel": MethodSpec(
        "a trained ParallelSpec head",
        "parse.speculative.proposers.parallelspec:load",
        model="required",
        supports_trees=True,
    ),
    "space": MethodSpec(
        "the target itself, by mask tokens (SPACE)",
        "parse.speculative.proposers.space:load",
        model="optional",
    ),
}

DRAFTING_MODES = tuple(name for name, mode in MODES.items() if mode.function and mode.uses_draft)
LOSSY_MODES = tuple(name for name, mode in MODES.items() if mode.function and not mode.keeps_distribution)


def resolve(path: str) -> Callable[..., Any]:
    """Returns the function that a `module:function` path names."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
