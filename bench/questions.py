"""What a server is asked under load: the demo task, or a file of prompts; each with its check where there is one."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from training.task import NAMES, Problem, check, problem, read


@dataclass(frozen=True)
class Task:
    """A question, and whether a text, which ended by itself or did not, is its answer."""

    messages: Sequence[Mapping[str, Any]]
    right: Callable[[str, bool], bool] | None = None


class BadPrompts(ValueError):
    """The file of prompts cannot be used."""


def demo_tasks(count: int, seed: int, cast: int = 0) -> list[Task]:
    """The problems of `training.measure`, which would load the whole of torch beside the server.

    Another cast has other names in the same problems: as hard, but nothing of them is in the server's cache.
    """
    given = [recast(problem("bench", seed, index), cast) for index in range(count)]
    return [Task(({"role": "user", "content": one.question},), partial(_solves, one)) for one in given]


def recast(given: Problem, cast: int) -> Problem:
    others = dict(zip(NAMES, NAMES[cast % len(NAMES) :] + NAMES, strict=False))
    return read(re.sub(r"\w+", lambda word: others.get(word[0], word[0]), given.question))


def _solves(given: Problem, text: str, ended: bool) -> bool:
    return ended and check(given, [text]).complete


def prompt_tasks(path: Path, count: int) -> list[Task]:
    """The file's, from the beginning again where it has fewer."""
    try:
        with path.open(encoding="utf-8") as lines:
            tasks = [_task(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompts(f"{path}: {error}") from error
    if not tasks:
        raise BadPrompts(f"{path}: holds no prompt")
    return list(islice(cycle(tasks), count))


def _task(line: str, place: str) -> Task:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise BadPrompts(f"{place}: no JSON: {error}") from error
    if fault := _fault(given):
        raise BadPrompts(f"{place}: {fault}")
    messages = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
    answer = given.get("answer")
    return Task(messages, partial(_says, answer) if answer else None)


def _fault(given: Any) -> str | None:
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        return 'must be {"prompt": ...} or {"messages": [...]}'
    if unknown := given.keys() - {"prompt", "messages", "answer"}:
        return f"{', '.join(sorted(unknown))}: not known"
    for name in given.keys() - {"messages"}:
        if not (isinstance(given[name], str) and given[name]):
            return f"{name}: must be text"
    messages = given.get("messages", [{}])
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        return "messages: must be a list of messages"
    return None


def _says(answer: str, text: str, ended: bool) -> bool:
    return answer in text
