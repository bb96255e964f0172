"""The requests of a load test: problems of the demo task, or prompts of a file. Most have a check of the answer."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from training.task import NAMES, Problem, check_answer, draw_problem, parse_question


@dataclass(frozen=True)
class SampleRequest:
    """Messages, and a check that receives the text of an answer and whether it is complete."""

    messages: Sequence[Mapping[str, Any]]
    is_correct: Callable[[str, bool], bool] | None = None


class InvalidPromptFile(ValueError):
    """The file of prompts cannot be used."""


def demo_requests(count: int, seed: int, name_set: int = 0) -> list[SampleRequest]:
    """Returns the problems of `training.measure`, without loading torch beside the server.

    Another name set puts other names into the same problems. They are equally hard, but the server has not cached them.
    """
    problems = [replace_names(draw_problem("bench", seed, index), name_set) for index in range(count)]
    return [
        SampleRequest(({"role": "user", "content": problem.question},), partial(_is_solution, problem))
        for problem in problems
    ]


def replace_names(problem: Problem, name_set: int) -> Problem:
    new_names = dict(zip(NAMES, NAMES[name_set % len(NAMES) :] + NAMES, strict=False))
    return parse_question(re.sub(r"\w+", lambda word: new_names.get(word[0], word[0]), problem.question))


def _is_solution(problem: Problem, text: str, ended: bool) -> bool:
    return ended and check_answer(problem, [text]).complete


def load_requests(path: Path, count: int, result: str | None = None) -> list[SampleRequest]:
    """Returns the requests of a file. If it has fewer, it is read again from the beginning.

    `result` is described in `load_problems`.
    """
    pattern = re.compile(result) if result is not None else None
    return list(islice(cycle(_read_requests(path, pattern)), count))


def number_prompts(requests: Sequence[SampleRequest], prefix: str) -> list[SampleRequest]:
    """Returns the requests with a different number in each first user message.

    A server that has cached a prompt therefore has to compute it again from there. A system message before it stays the
    same, because a server shares it between requests in production too.
    """
    return [
        replace(request, messages=_number_message(request.messages, f"(Request {prefix}-{number}.) "))
        for number, request in enumerate(requests, 1)
    ]


def _number_message(messages: Sequence[Mapping[str, Any]], prefix: str) -> list[Mapping[str, Any]]:
    numbered = list(messages)
    for index, message in enumerate(messages):
        if message.get("role") == "user":
            content = message.get("content")
            if not isinstance(content, str):
                content = [{"type": "text", "text": prefix}, *(content or ())]
            else:
                content = prefix + content
            numbered[index] = {**message, "content": content}
            break
    return numbered


def load_problems(path: Path, result: str | None = None) -> list[SampleRequest]:
    """Returns all requests of a file, each of which must have an answer.

    If there is a regular expression for the `result` of an answer, its last match must be the answer. Otherwise, the
    answer must occur in the text.
    """
    problems = _read_requests(path, re.compile(result) if result is not None else None)
    if missing := [number for number, problem in enumerate(problems, 1) if problem.is_correct is None]:
        raise InvalidPromptFile(f"{path}: problem {missing[0]} has no answer")
    return problems


def _read_requests(path: Path, result: re.Pattern[str] | None) -> list[SampleRequest]:
    try:
        with path.open(encoding="utf-8") as lines:
            requests = [
                _parse_request(line, f"{path}, line {number}", result)
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPromptFile(f"{path}: {error}") from error
    if not requests:
        raise InvalidPromptFile(f"{path}: holds no prompt")
    return requests


def _parse_request(line: str, location: str, result: re.Pattern[str] | None) -> SampleRequest:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidPromptFile(f"{location}: not valid JSON: {error}") from error
    if fault := _find_fault(entry):
        raise InvalidPromptFile(f"{location}: {fault}")
    messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
    answer = entry.get("answer")
    check = partial(_contains_answer, answer) if result is None else partial(_has_result, result, answer)
    return SampleRequest(messages, check if answer else None)


def _find_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        return 'must be {"prompt": ...} or {"messages": [...]}'
    if unknown := entry.keys() - {"prompt", "messages", "answer"}:
        return f"{', '.join(sorted(unknown))}: unknown field"
    for name in entry.keys() - {"messages"}:
        if not (isinstance(entry[name], str) and entry[name]):
            return f"{name}: must be text"
    messages = entry.get("messages", [{}])
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        return "messages: must be a list of messages"
    return None


def _contains_answer(answer: str, text: str, ended: bool) -> bool:
    return answer in text


def _has_result(pattern: re.Pattern[str], answer: str, text: str, ended: bool) -> bool:
    """Returns whether the last match of the pattern, or its first group, is the answer."""
    matches = list(pattern.finditer(text))
    return bool(matches) and matches[-1][pattern.groups and 1] == answer
