"""Tasks of the evaluation harnesses, whose programs run in an environment of their own.

A program prepares the problems of a task, and later grades the answers. Between the two, `bench.quality` sends the
problems itself, because it measures the modes in alternation and reads what the server reports about each answer.
"""

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.tasks.environment import install
from bench.tasks.task import BenchmarkProblem, Grades, ProblemAnswer, TaskUnavailable

PROGRAMS = Path(__file__).parent / "programs"
# The programs receive no other variables. One of them runs code that a model has written, which must not see API keys.
VARIABLES = (
    "HOME LANG PATH TMPDIR XDG_CACHE_HOME HF_HOME HF_ENDPOINT HF_HUB_CACHE HF_DATASETS_CACHE HF_HUB_OFFLINE "
    "HF_DATASETS_OFFLINE HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy REQUESTS_CA_BUNDLE "
    "SSL_CERT_FILE"
).split()


@dataclass(frozen=True)
class ProblemSource:
    """Which problems of a task are used."""

    task: str
    limit: int
    data_dir: str | None = None
    """A folder with the data set in JSON lines. None: the data set is downloaded."""


@dataclass(frozen=True)
class HarnessTask:
    """A task whose answers a program grades as right or wrong."""

    program: str
    source: ProblemSource
    problems: tuple[BenchmarkProblem, ...]
    max_tokens: int
    score_range: None = None

    @property
    def name(self) -> str:
        return self.source.task

    @classmethod
    def load(cls, program: str, source: ProblemSource, max_tokens: int) -> "HarnessTask":
        problems = call_program(program, "prepare", source)["problems"]
        return cls(program, source, tuple(map(parse_problem, problems)), max_tokens)

    async def grade(self, answers: Mapping[str, Sequence[ProblemAnswer]]) -> Grades:
        texts = {mode: [answer.texts[-1] for answer in of_mode] for mode, of_mode in answers.items()}
        result = await asyncio.to_thread(call_program, self.program, "grade", self.source, answers=texts)
        ids = tuple(problem.id for problem in self.problems)
        if ids != tuple(result["ids"]):
            raise TaskUnavailable(f"{self.name}: the data set has changed during the measurement")
        return Grades(ids, {mode: tuple(map(float, grades)) for mode, grades in result["grades"].items()})


def parse_problem(fields: Mapping[str, Any]) -> BenchmarkProblem:
    messages, *lists = (tuple(fields.get(name, ())) for name in ("messages", "follow_ups", "stop"))
    return BenchmarkProblem(fields["id"], messages, *lists)


def call_program(program: str, command: str, source: ProblemSource, **more: Any) -> Any:
    """Runs a program in the environment of the harnesses, and returns its result."""
    python = install()
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(json.dumps({"command": command, **asdict(source), **more}))
        done = subprocess.run(
            [str(python), str(PROGRAMS / f"{program}.py"), str(request), str(result)],
            env={name: os.environ[name] for name in VARIABLES if name in os.environ},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if not result.exists():
            lines = done.stderr.strip().splitlines() or [f"the program ended with code {done.returncode}"]
            raise TaskUnavailable(f"{source.task}: {lines[-1][-300:]}")
        document = json.loads(result.read_text())
    if "error" in document:
        raise TaskUnavailable(f"{source.task}: {document['error']}")
    return document
