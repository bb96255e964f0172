"""Inspect, the evaluation framework of the UK AI Security Institute, with evaluations of a few samples from memory."""

import os
import tempfile
from collections.abc import Sequence

import checks
from inspect_ai import Task, eval  # noqa: A004
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, ResponseSchema
from inspect_ai.scorer import includes, match
from inspect_ai.solver import Solver, generate, use_tools
from inspect_ai.tool import Tool, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

FOLDER = tempfile.TemporaryDirectory()
MODEL = f"openai-api/parse/{checks.MODEL}"
os.environ |= {"PARSE_API_KEY": "none", "PARSE_BASE_URL": checks.BASE_URL}
SAMPLES = [
    Sample(input=checks.QUESTION, target=target) for target in (checks.ANSWER, checks.ANSWER.split()[-1], "nobody")
]
CITIES: list[str] = []


class City(BaseModel):
    city: str


@tool
def get_weather() -> Tool:
    async def execute(city: str) -> str:
        """Returns the weather in a city.

        Args:
            city: The name of the city.
        """
        CITIES.append(city)
        return checks.WEATHER

    return execute


def run(task: Task, **options) -> EvalLog:
    """Runs a task and returns its log, or raises the error that ended it."""
    (log,) = eval(task, model=MODEL, display="none", log_dir=FOLDER.name, **options)
    if log.status != "success":
        _, _, answer = log.error.message.rpartition("Error code")  # the request is before it
        raise RuntimeError(answer or log.error.message)
    return log


def accuracy(log: EvalLog) -> float:
    return log.results.scores[0].metrics["accuracy"].value


def check_questions(log: EvalLog) -> None:
    assert accuracy(log) == 2 / 3, f"the accuracy is {accuracy(log)}"
    for sample in log.samples:
        checks.check_text(sample.output.completion)
    assert log.stats.model_usage[MODEL].output_tokens > 0


def run_tools(steps: Sequence[Solver], **options) -> None:
    CITIES.clear()
    samples = [Sample(input=checks.QUESTION, target=checks.WEATHER) for _ in range(3)]
    task = Task(dataset=samples, solver=steps, scorer=includes())
    log = run(task, model_base_url=checks.TOOLS_BASE_URL, **options)
    assert accuracy(log) == 1 and CITIES == ["Paris"] * 3, f"accuracy {accuracy(log)}, tool calls with {CITIES}"
    for sample in log.samples:
        checks.check_weather(sample.output.completion)


@checks.check("an evaluation")
def evaluation() -> None:
    check_questions(run(Task(dataset=SAMPLES, solver=generate(), scorer=match()), temperature=0))


@checks.check("a streamed evaluation")
def streamed_evaluation() -> None:
    log = run(Task(dataset=SAMPLES, solver=generate(), scorer=includes()), temperature=0, model_args={"stream": True})
    check_questions(log)


@checks.check("tools that are not strict")
def tools() -> None:
    run_tools([use_tools(get_weather()), generate()], model_args={"strict_tools": False})


@checks.rejected("strict tools", "tools[0].function.strict")
def strict_tools() -> None:
    run_tools([use_tools(get_weather()), generate()])


@checks.rejected("structured output", "response_format")
def structured() -> None:
    config = GenerateConfig(response_schema=ResponseSchema(name="city", json_schema=json_schema(City)))
    run(Task(dataset=SAMPLES, solver=generate(), scorer=includes(), config=config))


@checks.rejected("required tools", "tool_choice")
def required_tools() -> None:
    steps = [use_tools(get_weather(), **{"tool_choice": "any"}), generate()]
    run_tools(steps, model_args={"strict_tools": False})


checks.main()
