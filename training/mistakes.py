"""Composes synthetic answers in one wording or several, correct or with one mistake.

Mistakes are drawn evenly over their kinds and, for a slip, over the slots of a line. A verifier does not learn a kind
of mistake that is rare in training, even if it learns the others well.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from training.task import GAINING, ITEMS, LOSING, MAX_NUMBER, NAMES, ORDINALS, Problem, State
from training.wording import ENDINGS, LINES, Part, Slots, render_parts, slot_names

Word = TypeVar("Word", str, int, State)

Voice = Callable[[int, int], int | None]
"""Maps a line and a part of it to the index of an alternative, or to None, which draws one."""

MISTAKE_KINDS = "slip", "drift", "result", "other", "skip", "stop", "late"
NUM_ALTERNATIVES = 3  # alternatives of a part that has several

GROUPS = (
    NAMES,
    ITEMS,
    [*LOSING, *GAINING],
    ORDINALS,
    [nth.capitalize() for nth in ORDINALS],
    *("minus plus", "- +", "down up", "below above", "< >", "less more"),
)
SIMILAR_WORDS = {
    word: words
    for group in GROUPS
    for words in [group.split() if isinstance(group, str) else list(group)]
    for word in words
}


class Phrase(NamedTuple):
    text: str
    wording: int | None
    """The index of the alternative. None if there is only one."""


def compose_answer(problem: Problem, rng: random.Random, voice: Voice, kind: str | None = None) -> list[Phrase]:
    """Returns the phrases of an answer. `kind` names the mistake that it contains, if any."""
    parts, endings = LINES[problem.family], ENDINGS[problem.family]
    mistake_step = rng.randrange(problem.steps + (kind == "slip"))  # a slip can also be in the last line
    phrases: list[Phrase] = []
    state = problem.start
    for number in range(problem.steps):
        mistake = kind if number == mistake_step else None
        if mistake == "stop":
            break
        if mistake == "skip":
            if rng.random() < 0.5:  # the line is missing but the state changes, or the step is forgotten completely
                state = problem.step(number, state).state
            continue
        if mistake == "drift":
            state = _another_state(problem, rng, state)
        takes = _another(rng, range(problem.steps), number) if mistake == "other" else None
        to = _another_state(problem, rng, problem.step(number, state).state) if mistake == "result" else None
        slots, after = problem.step(number, state, takes=takes, to=to)
        phrases += _line(parts, slots, rng, number, voice, slip=mistake == "slip", problem=problem)
        # Sometimes the next step continues from the correct result, as after a typing error.
        state = problem.step(number, state).state if mistake == "result" and rng.random() < 0.2 else after
    if kind == "late" and problem.steps < len(ORDINALS):
        slots, state = problem.step(problem.steps, state, takes=rng.randrange(problem.steps))
        phrases += _line(parts, slots, rng, problem.steps, voice)
    slip = kind == "slip" and mistake_step == problem.steps
    return phrases + _line(endings, problem.ending(state), rng, problem.steps, voice, slip=slip, problem=problem)


def _line(
    parts: tuple[Part, ...],
    slots: Slots,
    rng: random.Random,
    number: int,
    voice: Voice,
    *,
    slip: bool = False,
    problem: Problem | None = None,
) -> list[Phrase]:
    wordings = [voice(number, k) for k in range(len(parts))]
    choice = [rng.randrange(NUM_ALTERNATIVES) if wording is None else wording for wording in wordings]
    texts = render_parts(parts, choice, slots)
    if slip and problem is not None:
        alternatives = [part[min(index, len(part) - 1)] for part, index in zip(parts, choice, strict=True)]
        part_index, slot = rng.choice(
            [(k, name) for k, text in enumerate(alternatives) for name in set(slot_names(text))]
        )
        texts[part_index] = alternatives[part_index].format_map({**slots, slot: _wrong_word(problem, rng, slots[slot])})
    return [
        Phrase(text, index if len(part) > 1 else None) for text, index, part in zip(texts, choice, parts, strict=True)
    ]


def _wrong_word(problem: Problem, rng: random.Random, word: str) -> str:
    """Returns another word of the same kind. A number is mostly near the correct one, a name mostly in the question."""
    if word.isdigit():
        return str(_wrong_number(rng, int(word), problem))
    names_in_question = [name for name in NAMES if name in problem.question and name != word] if word in NAMES else []
    return (
        rng.choice(names_in_question)
        if names_in_question and rng.random() < 0.8
        else _another(rng, SIMILAR_WORDS[word], word)
    )


def _wrong_number(rng: random.Random, number: int, problem: Problem) -> int:
    draw = rng.random()
    if draw < 0.4:
        wrong = number + rng.choice((-2, -1, 1, 2))
    elif draw < 0.6:
        wrong = number + rng.choice((-10, 10, -20, 20))
    elif draw < 0.8:
        wrong = int(
            rng.choice([word for word in problem.question.replace(",", " ").split() if word.isdigit()] or ["0"])
        )
    else:
        wrong = rng.randint(0, MAX_NUMBER)
    return wrong if wrong != number and 0 <= wrong <= MAX_NUMBER else _another(rng, range(MAX_NUMBER + 1), number)


def _another_state(problem: Problem, rng: random.Random, state: State) -> State:
    if len(state) == 1 and state[0].isdigit():
        return (str(_wrong_number(rng, int(state[0]), problem)),)
    return _another(rng, problem.states(), state)


def _another(rng: random.Random, choices: Sequence[Word], but: Word) -> Word:
    return rng.choice([choice for choice in choices if choice != but])


def scramble_words(problem: Problem, words: Sequence[str], rng: random.Random, share: float) -> list[str]:
    """Returns the words of an answer with a share of its numbers, names and similar words replaced."""
    out = []
    for word in words:
        stripped = word.strip()
        if (stripped in SIMILAR_WORDS or stripped.isdigit()) and rng.random() < share:
            word = word.replace(stripped, _wrong_word(problem, rng, stripped))
        out.append(word)
    return out
