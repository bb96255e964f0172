"""The wording of a step: every line is a sequence of parts, and each part has several correct wordings.

Alternative 0 of each part is the target's wording, alternative 1 the draft's; the others are right too and
nobody's own. A line is right when each part is one of its alternatives with the true values, so two right
answers to one question may share little more than their numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from string import Formatter

TARGET, DRAFT = 0, 1

Part = tuple[str, ...]
"""The alternatives of one part: format strings over the slots of a line. Their first tokens differ."""

Slots = Mapping[str, str]

LINES: dict[str, tuple[Part, ...]] = {
    "totals": (
        ("{Nth}, {name} {verb} {b}:", "Step {i}:", "The {nth} move, {verb} {b}:"),
        (" {a}",),
        (" {minus}", " {sign}", " {down}"),
        (" {b}",),
        (" makes", " =", " gives"),
        (" {c}.\n",),
    ),
    "record": (
        ("{Nth}, {name} scores {b},", "Step {i}: {name} {b}", "The {nth} has {b},"),
        (" {below} {a},", " {less} {a},", " {under} than {a},"),
        (" so {leader} leads with {top}.\n", " top {leader} {top}.\n", " first is {leader} with {top}.\n"),
    ),
}

ENDINGS: dict[str, tuple[Part, ...]] = {
    "totals": (("So {name} has {c} {item} now.", "Answer: {c} {item}.", "That leaves {c} {item}."),),
    "record": (
        ("So {leader} has the record now, with {top}.", "Answer: {leader} {top}.", "That leaves {leader} with {top}."),
    ),
}


def render_parts(parts: Sequence[Part], choice: Sequence[int], slots: Slots) -> list[str]:
    """Returns the text of each part in the chosen wording. A part without that alternative has only one wording."""
    return [
        part[index if index < len(part) else 0].format_map(slots) for part, index in zip(parts, choice, strict=True)
    ]


def all_wordings(parts: Sequence[Part], slots: Slots) -> list[str]:
    """All right texts of a line."""
    return [
        "".join(words)
        for words in product(*([alternative.format_map(slots) for alternative in part] for part in parts))
    ]


def slot_names(alternative: str) -> Iterator[str]:
    return (name for _, name, _, _ in Formatter().parse(alternative) if name)
