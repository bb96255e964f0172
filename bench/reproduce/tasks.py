"""The problems that all contenders answer: those of the demo task, or those of a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from training.task import Problem, draw_problem

DEMO_TASK = "demo"
GENERATED_FILE = "problems.jsonl"
NUM_GENERATED = 500
GENERATED_RESULT = r"(?i)answer:\D*(\d+)"
INSTRUCTION = (
    " Work through the turns one by one, and write one line for each turn. End with a line that begins with 'Answer:' "
    "and contains one number: the total, or the record."
)
DEMO_MAX_TOKENS, DEFAULT_MAX_TOKENS = 240, 1024


@dataclass(frozen=True)
class Tasks:
    """The problems of the load measurements and of the measurement of quality."""

    prompts: Path | None
    """The file with the problems of the load measurements. Without a file they are those of the demo task."""
    result: str | None
    """A regular expression that finds the result in an answer to a problem of the file."""
    quality: tuple[str, ...]
    limit: int
    """The number of problems of each task of the measurement of quality."""
    max_tokens: int
    """Of an answer under load."""
    quality_max_tokens: int | None = None
    """Of an answer of the measurement of quality. None is the default of each task."""
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QualityOptions:
    """What the user chooses."""

    limit: int
    max_tokens: int | None = None
    quality: tuple[str, ...] = ()


def demo_tasks(options: QualityOptions) -> Tasks:
    return _tasks(options, None, None, DEMO_TASK, DEMO_MAX_TOKENS)


def file_tasks(options: QualityOptions, path: Path, result: str | None) -> Tasks:
    note = (
        "Each prompt of a load measurement begins with a number of its own, so that no contender uses what is cached "
        "for another one."
    )
    return replace(_tasks(options, path, result, str(path), DEFAULT_MAX_TOKENS), notes=(note,))


def generated_tasks(options: QualityOptions, out: Path) -> Tasks:
    """Returns problems for targets that do not know the demo task: each prompt explains it."""
    tasks = file_tasks(options, out / GENERATED_FILE, GENERATED_RESULT)
    note = (
        "No problems were chosen with --problems, so the load consists of generated puzzles with short prompts. Your "
        "own problems may give other ratios."
    )
    lines = [json.dumps(_explained(draw_problem("bench", 0, index))) for index in range(NUM_GENERATED)]
    return replace(tasks, notes=(note, *tasks.notes), files={GENERATED_FILE: "\n".join(lines) + "\n"})


def _tasks(options: QualityOptions, prompts: Path | None, result: str | None, name: str, max_tokens: int) -> Tasks:
    """Returns the tasks. By default, the quality is measured on the problems of the load."""
    load_max_tokens = options.max_tokens or max_tokens
    return Tasks(
        prompts,
        result,
        options.quality or (name,),
        options.limit,
        load_max_tokens,
        options.max_tokens if options.quality else load_max_tokens,
    )


def _explained(problem: Problem) -> dict[str, str]:
    state = problem.start
    for number in range(problem.steps):
        state = problem.step(number, state).state
    return {"prompt": problem.question + INSTRUCTION, "answer": state[-1]}
