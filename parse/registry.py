"""The registry of modes, token-level methods and acceptance rules.

All of them are chosen by name. Settings, HTTP API, metrics and documentation read their choices from this module. To
add a mode, a method or a rule to the project, write its module and add an entry here. An entry names its function by
path, and the module is imported on first use, so this table imports none of them.

Code outside the project adds methods and rules with `register_method` and `register_rule`. They are then available by
name in the same process.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from parse.errors import RequestError

ModelNeed = Literal["required", "optional", "none"]

RuleFunction = Callable[[Sequence[float | None], float], int]
"""An acceptance rule. It takes P(correct) of each prefix in ascending order, and the threshold `prefix`. It returns the
number of prefixes to keep, counted from the shortest. A prefix that was not evaluated (None) must not pass."""


@dataclass(frozen=True)
class ModeSpec:
    """A mode, that is, a way to use drafts.

    `auto` selects one of the others, so its `function` is None.
    """

    description: str
    function: str | None
    uses_draft: bool = True
    keeps_distribution: bool = False
    """Whether the output has the target's own distribution for every draft."""


@dataclass(frozen=True)
class MethodSpec:
    """A method that proposes several of the target's next tokens.

    It does not change the output.
    """

    description: str
    loader: str | Callable[..., Any]
    """The function `load(config, load_context)` of the method, or its path `module:function`."""
    model: ModelNeed
    """Whether the method needs its own checkpoint."""
    supports_trees: bool = False
    is_sequential: bool = False
    """Whether each further token of a proposal takes another step of the method."""
    supports_unchecked_drafting: bool = False
    """Whether it proposes chains and estimates the probability of each token, so that a draft model can use tokens
    unchecked."""
    loads_language_model: bool = False
    """Whether the checkpoint is a causal language model of its own, and not a part that is attached to the target."""


@dataclass(frozen=True)
class RuleSpec:
    """An acceptance rule.

    It chooses the accepted prefix from P(correct) of all prefixes.
    """

    description: str
    function: str | RuleFunction
    """The rule, or its path `module:function`."""
    stops_at_failure: bool = False
    """If true, the prefixes after the first one that fails cannot change the result, so they are not evaluated."""


MODES: Mapping[str, ModeSpec] = {
    "auto": ModeSpec("Drafts while drafting pays, in the mode of the setting `auto_mode`; otherwise like `off`.", None),
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

METHODS: dict[str, MethodSpec] = {
    "draft_model": MethodSpec(
        "a small model beside the target",
        "parse.speculative.proposers.draft_model:load",
        model="required",
        is_sequential=True,
        loads_language_model=True,
    ),
    "ngram": MethodSpec(
        "the tokens that followed an earlier occurrence of the last few tokens",
        "parse.speculative.proposers.ngram:load",
        model="none",
    ),
    "eagle3": MethodSpec(
        "a trained EAGLE-3 head",
        "parse.speculative.proposers.eagle3:load",
        model="required",
        supports_trees=True,
        is_sequential=True,
        supports_unchecked_drafting=True,
    ),
    "parallel": MethodSpec(
        "a trained ParallelSpec head",
        "parse.speculative.proposers.parallelspec:load",
        model="required",
        supports_trees=True,
        supports_unchecked_drafting=True,
    ),
    "space": MethodSpec(
        "the target's own predictions at mask tokens (SPACE)",
        "parse.speculative.proposers.space:load",
        model="optional",
    ),
}

RULES: dict[str, RuleSpec] = {
    "first_failure": RuleSpec(
        "keeps the last prefix before the first one that fails", "parse.acceptance:first_failure", stops_at_failure=True
    ),
    "longest_passing": RuleSpec("keeps the longest prefix that passes", "parse.acceptance:last_passing"),
}

DRAFTING_MODES = tuple(name for name, mode in MODES.items() if mode.function and mode.uses_draft)
LOSSY_MODES = tuple(name for name, mode in MODES.items() if mode.function and not mode.keeps_distribution)

_BUILT_IN = frozenset((*METHODS, *RULES, "none"))  # "none" selects no method in requests


def is_built_in(name: str) -> bool:
    """Whether a method or rule belongs to this project."""
    return name in _BUILT_IN


def register_method(name: str, spec: MethodSpec) -> None:
    """Adds a token-level method.

    `SpeculativeConfig` and requests can then name it. A second call with the same name replaces the method. The name of
    a built-in method is rejected.
    """
    _check_entry(name, spec, MethodSpec)
    _check_function("loader", spec.loader)
    if spec.model not in get_args(ModelNeed):
        raise RequestError("model", f"must be one of {', '.join(get_args(ModelNeed))}, got {spec.model!r}")
    METHODS[name] = spec


def register_rule(name: str, spec: RuleSpec) -> None:
    """Adds an acceptance rule.

    `VerificationSettings` and `AcceptancePolicy` can then name it. A second call with the same name replaces the rule.
    The name of a built-in rule is rejected. Every process that verifies drafts has to register the rule.
    """
    _check_entry(name, spec, RuleSpec)
    _check_function("function", spec.function)
    RULES[name] = spec


def get_rule(name: str) -> RuleSpec:
    if name not in RULES:
        choices = ", ".join(RULES)
        raise RequestError("rule", f"must be one of {choices}, or registered with `register_rule`; got {name!r}")
    return RULES[name]


def resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is given directly or by its path `module:function`."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    resolved: Callable[..., Any] = getattr(import_module(module), name)
    return resolved


def _check_entry(name: object, spec: object, spec_type: type) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RequestError("name", f"must consist of lower-case letters, digits and underscores, got {name!r}")
    if name in _BUILT_IN:
        raise RequestError("name", f"{name!r} is a name of this project; choose another one")
    if not isinstance(spec, spec_type):
        raise RequestError("spec", f"must be a {spec_type.__name__}, got {spec!r}")


def _check_function(field: str, function: object) -> None:
    is_path = isinstance(function, str) and re.fullmatch(r"[\w.]+:\w+", function)
    if not is_path and not callable(function):
        raise RequestError(field, f"must be a function or its path module:function, got {function!r}")
