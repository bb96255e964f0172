"""The wording of a step: every line is a sequence of parts, and each part has several correct wordings.

Alternative 0 of each part is the target's wording, and alternative 1 the draft model's. The others are correct too, but
neither model uses them. A line is correct if each part is one of its alternatives with the true values. So two correct
answers to one question may have little more than the numbers in common.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from string import Formatter

TARGET, DRAFT = 0, 1

Part = tuple[str, ...]
"""The alternatives of one part: format strings over the slots of a line. They start with different tokens."""

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
    """Returns all correct texts of a line."""
    return [
        "".join(words)
        for words in product(*([alternative.format_map(slots) for alternative in part] for part in parts))
    ]


def slot_names(alternative: str) -> Iterator[str]:
    return (name for _, name, _, _ in Formatter().parse(alternative) if name)
