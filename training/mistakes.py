"""Answers as a writer would give them, in one wording or several, right or with one mistake.

Mistakes are drawn evenly over their kinds and, within a slip, over the slots of a line: a verifier that seldom sees
a kind of mistake does not learn it, however well it does on the others.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from training.task import GAINING, ITEMS, LARGEST, LOSING, NAMES, ORDINALS, Problem, State
from training.wording import ENDINGS, LINES, Part, Slots, said, slot_names

Word = TypeVar("Word", str, int, State)

Voice = Callable[[int, int], int | None]
"""Which wording a part of a line takes (line, part): an alternative's index, or None to draw one."""

KINDS = "slip", "drift", "result", "other", "skip", "stop", "late"
OTHERS = 3  # alternatives of a part that has several

GROUPS = (
    NAMES,
    ITEMS,
    [*LOSING, *GAINING],
    ORDINALS,
    [nth.capitalize() for nth in ORDINALS],
    *("minus plus", "- +", "down up", "below above", "< >", "less more"),
)
ALIKE = {
    word: words
    for group in GROUPS
    for words in [group.split() if isinstance(group, str) else list(group)]
    for word in words
}


class Phrase(NamedTuple):
    text: str
    wording: int | None
    """Which alternative was taken; None where there was no choice."""


def compose(given: Problem, rng: random.Random, voice: Voice, kind: str | None = None) -> list[Phrase]:
    """An answer to `given`, phrase by phrase; `kind` names the mistake it holds, somewhere."""
    parts, endings = LINES[given.family], ENDINGS[given.family]
    at = rng.randrange(given.steps + (kind == "slip"))  # a slip may fall into the last line as well
    phrases: list[Phrase] = []
    state = given.start
    for number in range(given.steps):
        here = kind if number == at else None
        if here == "stop":
            break
        if here == "skip":
            if rng.random() < 0.5:  # said to be done, or forgotten altogether
                state = given.step(number, state).state
            continue
        if here == "drift":
            state = _another_state(given, rng, state)
        takes = _another(rng, range(given.steps), number) if here == "other" else None
        to = _another_state(given, rng, given.step(number, state).state) if here == "result" else None
        slots, after = given.step(number, state, takes=takes, to=to)
        phrases += _line(parts, slots, rng, number, voice, slip=here == "slip", given=given)
        # A wrong result may be a slip of the pen, with the next step going on from the right one.
        state = given.step(number, state).state if here == "result" and rng.random() < 0.2 else after
    if kind == "late" and given.steps < len(ORDINALS):
        slots, state = given.step(given.steps, state, takes=rng.randrange(given.steps))
        phrases += _line(parts, slots, rng, given.steps, voice)
    slip = kind == "slip" and at == given.steps
    return phrases + _line(endings, given.ending(state), rng, given.steps, voice, slip=slip, given=given)


def _line(
    parts: tuple[Part, ...],
    slots: Slots,
    rng: random.Random,
    number: int,
    voice: Voice,
    *,
    slip: bool = False,
    given: Problem | None = None,
) -> list[Phrase]:
    wordings = [voice(number, k) for k in range(len(parts))]
    choice = [rng.randrange(OTHERS) if wording is None else wording for wording in wordings]
    texts = said(parts, choice, slots)
    if slip and given is not None:
        chosen = [part[min(index, len(part) - 1)] for part, index in zip(parts, choice, strict=True)]
        where, slot = rng.choice([(k, name) for k, text in enumerate(chosen) for name in set(slot_names(text))])
        texts[where] = chosen[where].format_map({**slots, slot: _mistaken(given, rng, slots[slot])})
    return [
        Phrase(text, index if len(part) > 1 else None) for text, index, part in zip(texts, choice, parts, strict=True)
    ]


def _mistaken(given: Problem, rng: random.Random, word: str) -> str:
    """Another word of the same sort; a number mostly near the right one, a name mostly one of the question's."""
    if word.isdigit():
        return str(_near(rng, int(word), given))
    named = [name for name in NAMES if name in given.question and name != word] if word in NAMES else []
    return rng.choice(named) if named and rng.random() < 0.8 else _another(rng, ALIKE[word], word)


def _near(rng: random.Random, number: int, given: Problem) -> int:
    draw = rng.random()
    if draw < 0.4:
        wrong = number + rng.choice((-2, -1, 1, 2))
    elif draw < 0.6:
        wrong = number + rng.choice((-10, 10, -20, 20))
    elif draw < 0.8:
        wrong = int(rng.choice([word for word in given.question.replace(",", " ").split() if word.isdigit()] or ["0"]))
    else:
        wrong = rng.randint(0, LARGEST)
    return wrong if wrong != number and 0 <= wrong <= LARGEST else _another(rng, range(LARGEST + 1), number)


def _another_state(given: Problem, rng: random.Random, state: State) -> State:
    if len(state) == 1 and state[0].isdigit():
        return (str(_near(rng, int(state[0]), given)),)
    return _another(rng, given.states(), state)


def _another(rng: random.Random, choices: Sequence[Word], but: Word) -> Word:
    return rng.choice([choice for choice in choices if choice != but])


def scrambled(given: Problem, words: Sequence[str], rng: random.Random, share: float) -> list[str]:
    """The words of an answer with a share of its numbers, names and the like replaced by others of their sort."""
    out = []
    for word in words:
        bare = word.strip()
        if (bare in ALIKE or bare.isdigit()) and rng.random() < share:
            word = word.replace(bare, _mistaken(given, rng, bare))
        out.append(word)
    return out
