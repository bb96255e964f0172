"""The task of the demo pair: questions that are answered step by step, and an exact checker of any prefix.

Two families share one form: a state, a number of numbered steps that each change the state, and a last line.

- *totals*: a number of items that grows and shrinks (arithmetic);
- *record*: a best score that is kept or beaten (comparing, and remembering whose score it is).

    python -m training.task --problems 3 --seed 1
    python -m training.task --question "..." --answer "..."
"""

import argparse
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

from training.wording import DRAFT, ENDINGS, LINES, TARGET, Slots, all_wordings, render_parts

NAMES = (
    "Ann Ben Cara Dan Eve Finn Gus Hal Ida Jack Kim Leo Max Nora Otto Pam Quinn Rosa Sam Tess Uma Vera Will Zoe"
).split()
ITEMS = "shells coins cards books apples stamps marbles pens keys nuts".split()
LOSING = "loses sells drops breaks lends".split()
GAINING = "finds buys wins gets earns".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth".split()
MAX_NUMBER = 99  # totals and scores; each number is one token

State = tuple[str, ...]
"""The state that the steps change, as words: (total,) or (leader, score)."""


class UnrecognizedQuestion(ValueError):
    """The text is not a question of this task."""


class Step(NamedTuple):
    slots: Slots
    state: State  # after the step


class Problem(Protocol):
    """One question. `step` works from any state, so that a wrong answer can be continued as well."""

    @property
    def family(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def start(self) -> State: ...

    def step(self, number: int, state: State, *, takes: int | None = None, to: State | None = None) -> Step:
        """Returns step `number` (from 0) after `state`.

        `takes` is the number of another step, whose operation is used, and `to` a state that replaces the result.
        """
        ...

    def ending(self, state: State) -> Slots: ...
    def states(self) -> list[State]:
        """Returns states that a wrong answer could contain."""
        ...


@dataclass(frozen=True)
class TotalsProblem:
    name: str
    item: str
    first: int
    moves: tuple[tuple[str, int], ...]
    family = "totals"

    @property
    def question(self) -> str:
        moves = ", ".join(f"{ORDINALS[k]} {verb} {by}" for k, (verb, by) in enumerate(self.moves))
        return f"{self.name} has {self.first} {self.item}. In turn: {moves}. How many {self.item} now?"

    @property
    def steps(self) -> int:
        return len(self.moves)

    @property
    def start(self) -> State:
        return (str(self.first),)

    def step(self, number: int, state: State, *, takes: int | None = None, to: State | None = None) -> Step:
        verb, by = self.moves[number if takes is None else takes]
        loses = verb in LOSING
        total = int(state[0]) + (-by if loses else by)
        after = to or (str(min(max(total, 0), MAX_NUMBER)),)  # only a mistaken answer can leave the range
        words = ("minus", "-", "down") if loses else ("plus", "+", "up")
        slots = dict(zip(("minus", "sign", "down"), words, strict=True))
        slots |= _labels(number) | dict(name=self.name, item=self.item, verb=verb, a=state[0], b=str(by), c=after[0])
        return Step(slots, after)

    def ending(self, state: State) -> Slots:
        return dict(name=self.name, item=self.item, c=state[0])

    def states(self) -> list[State]:
        return [(str(total),) for total in range(MAX_NUMBER + 1)]

    @classmethod
    def draw(cls, rng: random.Random) -> "TotalsProblem":
        first = total = rng.randint(10, 90)
        moves = []
        for _ in range(rng.randint(7, 13)):
            by = rng.randint(2, 9)
            loses = total + by > MAX_NUMBER or (total >= by and rng.random() < 0.5)
            moves.append((rng.choice(LOSING if loses else GAINING), by))
            total += -by if loses else by
        return cls(rng.choice(NAMES), rng.choice(ITEMS), first, tuple(moves))

    @classmethod
    def parse(cls, question: str) -> "TotalsProblem | None":
        shape = re.fullmatch(r"(\w+) has (\d+) (\w+)\. In turn: (.+)\. How many (\w+) now\?", question)
        if not shape:
            return None
        name, first, item, moves, _ = shape.groups()
        pairs = [move.split()[1:] for move in moves.split(", ")]
        return cls(name, item, int(first), tuple((verb, int(by)) for verb, by in pairs))


@dataclass(frozen=True)
class RecordProblem:
    first: tuple[str, int]
    scores: tuple[tuple[str, int], ...]
    family = "record"

    @property
    def question(self) -> str:
        scores = ", ".join(f"{ORDINALS[k]} {name} {score}" for k, (name, score) in enumerate(self.scores))
        return f"{self.first[0]} has the record with {self.first[1]}. In turn: {scores}. Who has the record now?"

    @property
    def steps(self) -> int:
        return len(self.scores)

    @property
    def start(self) -> State:
        return (self.first[0], str(self.first[1]))

    def step(self, number: int, state: State, *, takes: int | None = None, to: State | None = None) -> Step:
        name, score = self.scores[number if takes is None else takes]
        beaten = score > int(state[1])
        after = to or ((name, str(score)) if beaten else state)
        words = ("above", ">", "more") if beaten else ("below", "<", "less")
        slots = dict(zip(("below", "less", "under"), words, strict=True))
        slots |= _labels(number) | dict(name=name, b=str(score), a=state[1], leader=after[0], top=after[1])
        return Step(slots, after)

    def ending(self, state: State) -> Slots:
        return dict(leader=state[0], top=state[1])

    def states(self) -> list[State]:
        return [(name, str(score)) for name, score in (self.first, *self.scores)]

    @classmethod
    def draw(cls, rng: random.Random) -> "RecordProblem":
        count = rng.randint(6, 12)
        names = rng.sample(NAMES, count + 1)
        scores = rng.sample(range(1, MAX_NUMBER + 1), count)
        # Half of the records are low enough to be beaten more than once. Otherwise most are never beaten.
        first = rng.choice([s for s in range(1, MAX_NUMBER if rng.random() < 0.5 else 40) if s not in scores])
        return cls((names[0], first), tuple(zip(names[1:], scores, strict=True)))

    @classmethod
    def draw_close(cls, rng: random.Random) -> "RecordProblem":
        """Draws a problem with difficult comparisons: most scores are within a few points of the record."""
        count = rng.randint(6, 12)
        names = rng.sample(NAMES, count + 1)
        record = first = rng.randint(5, MAX_NUMBER - 5)
        scores: list[int] = []
        for _ in range(count):
            near = [record + apart for apart in (-3, -2, -1, 1, 2, 3) if 1 <= record + apart <= MAX_NUMBER]
            free = [score for score in near if score != first and score not in scores]
            if rng.random() < 0.3 or not free:
                free = [score for score in range(1, MAX_NUMBER + 1) if score != first and score not in scores]
            scores.append(rng.choice(free))
            record = max(record, scores[-1])
        return cls((names[0], first), tuple(zip(names[1:], scores, strict=True)))

    @classmethod
    def parse(cls, question: str) -> "RecordProblem | None":
        shape = re.fullmatch(r"(\w+) has the record with (\d+)\. In turn: (.+)\. Who has the record now\?", question)
        if not shape:
            return None
        pairs = [event.split()[1:] for event in shape[3].split(", ")]
        return cls((shape[1], int(shape[2])), tuple((name, int(score)) for name, score in pairs))


FAMILIES: tuple[type[TotalsProblem] | type[RecordProblem], ...] = (TotalsProblem, RecordProblem)


def _labels(number: int) -> dict[str, str]:
    return dict(i=str(number + 1), nth=ORDINALS[number], Nth=ORDINALS[number].capitalize())


def draw_problem(split: str, seed: int, index: int) -> Problem:
    """Returns problem `index` of an endless sequence that depends on the split and the seed."""
    rng = random.Random(f"{split}/{seed}/{index}")
    return FAMILIES[index % len(FAMILIES)].draw(rng)


def draw_close_record(split: str, seed: int, index: int) -> Problem:
    """Returns a problem like `draw_problem`, but always a record with difficult comparisons."""
    return RecordProblem.draw_close(random.Random(f"close {split}/{seed}/{index}"))


def parse_question(question: str) -> Problem:
    """Returns the problem of a question."""
    for family in FAMILIES:
        try:
            problem = family.parse(question)
            if problem and problem.question == question and _solvable(problem):
                return problem
        except (ValueError, LookupError):
            continue  # the form fits, but a clause does not
    raise UnrecognizedQuestion(f"not a question of this task: {question[:120]!r}")


def _solvable(problem: Problem) -> bool:
    state = problem.start
    for number in range(problem.steps):
        state = problem.step(number, state).state
    return problem.steps > 0


def correct_answer(problem: Problem, wording: int = TARGET) -> str:
    """Returns the correct answer in one wording."""
    text, state = [], problem.start
    for number in range(problem.steps):
        slots, state = problem.step(number, state)
        text += render_parts(LINES[problem.family], [wording] * len(LINES[problem.family]), slots)
    return "".join(text + render_parts(ENDINGS[problem.family], [wording], problem.ending(state)))


class CheckResult(NamedTuple):
    first_wrong: int | None
    """Index of the first token that no correct answer has at its position; None if there is none."""
    complete: bool
    """The tokens are a complete correct answer."""


def check_answer(problem: Problem, token_texts: Sequence[str]) -> CheckResult:
    """Checks an answer or the beginning of one, split into tokens in any way."""
    state, number, line = problem.start, 0, ""
    candidates = _correct_lines(problem, number, state)
    for index, token_text in enumerate(token_texts):
        line += token_text
        while candidates and number < problem.steps and "\n" in line:
            finished_line, line = line.split("\n", 1)
            if finished_line + "\n" not in candidates:
                return CheckResult(index, False)
            state = problem.step(number, state).state
            number += 1
            candidates = _correct_lines(problem, number, state)
        candidates = [candidate for candidate in candidates if candidate.startswith(line)]
        if not candidates:
            return CheckResult(index, False)
    return CheckResult(None, number == problem.steps and line in candidates)


def _correct_lines(problem: Problem, number: int, state: State) -> list[str]:
    if number < problem.steps:
        return all_wordings(LINES[problem.family], problem.step(number, state).slots)
    return all_wordings(ENDINGS[problem.family], problem.ending(state))


@cache
def vocabulary() -> frozenset[str]:
    """Returns every word and sign that a question or a correct answer can contain."""
    texts = []
    for index in range(len(FAMILIES) * 400):
        problem = draw_problem("vocabulary", 0, index)
        texts.append(problem.question)
        state = problem.start
        for number in range(problem.steps):
            texts += _correct_lines(problem, number, state)
            state = problem.step(number, state).state
        texts += _correct_lines(problem, problem.steps, state)
    return frozenset(word for text in set(texts) for word in WORD.findall(text))


WORD = re.compile(r"\.\n| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+")
"""Matches one word: a word or a number with the space before it, a sign, or the full stop at the end of a line."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.task", description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=3, help="number of problems to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", help="check the --answer to this question instead")
    parser.add_argument("--answer")
    args = parser.parse_args()
    if (args.question is None) != (args.answer is None):
        parser.error("--question and --answer go together")
    if args.question is None:
        for index in range(args.problems):
            problem = draw_problem("shown", args.seed, index)
            print(f"{problem.question}\n\n{correct_answer(problem)}\n\n  or\n\n{correct_answer(problem, DRAFT)}\n\n")
        return
    try:
        problem = parse_question(args.question)
    except UnrecognizedQuestion as error:
        sys.exit(str(error))
    words = WORD.findall(args.answer.replace("\\n", "\n"))
    unknown_word = next((word for word in words if word not in vocabulary()), None)
    if unknown_word is not None:
        sys.exit(f"not an answer of this task, which does not contain {unknown_word!r}")
    result = check_answer(problem, words)
    if result.first_wrong is not None:
        print(f"wrong at word {result.first_wrong}: {words[result.first_wrong]!r}")
    else:
        print("correct" if result.complete else "correct so far")


if __name__ == "__main__":
    main()
