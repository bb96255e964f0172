"""What a task is: problems with known results, and a grade for each answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class BenchmarkProblem:
    """One problem of a task, as it is sent to the server."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    follow_ups: tuple[str, ...] = ()
    """Further messages of the user. Each one is sent after the answer to the message before it."""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProblemAnswer:
    """What a mode has answered to one problem."""

    texts: tuple[str, ...]
    """The answer to the messages of the problem, and to each follow-up."""
    ended: bool
    """All of them are complete: none ended at the limit of tokens."""


@dataclass(frozen=True)
class Grades:
    """The grades of the answers of all modes, in the order of the problems.

    A problem whose answers could not all be graded is left out for every mode, so that the modes stay comparable.
    """

    problem_ids: tuple[str, ...]
    by_mode: Mapping[str, tuple[float, ...]]


class TaskUnavailable(Exception):
    """A task cannot be run here, or its answers cannot be graded."""


class BenchmarkTask(Protocol):
    """Problems, and how their answers are graded."""

    @property
    def name(self) -> str: ...
    @property
    def max_tokens(self) -> int:
        """The default limit of an answer."""
        ...

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The lowest and the highest score of an answer. None: answers are right (1) or wrong (0)."""
        ...

    @property
    def problems(self) -> Sequence[BenchmarkProblem]: ...

    async def grade(self, answers: Mapping[str, Sequence[ProblemAnswer]]) -> Grades:
        """Returns the grades of the answers of each mode to all problems."""
        ...
