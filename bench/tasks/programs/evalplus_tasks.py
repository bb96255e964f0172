"""Prepares HumanEval+ and MBPP+, and grades their answers, with evalplus.

Grading runs the programs that the answers contain. evalplus runs each in a process with limited memory and time, and
without the functions that most easily do damage. This is no protection against code that wants to do harm.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from protocol import data_file, serve_request

# evalplus reads these variables when it is imported.
FILE_VARIABLES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
# The words of evalplus, so that the results are comparable with others.
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
Problem = Mapping[str, Any]


def load_problems(request: Mapping[str, Any]) -> list[Problem]:
    file = data_file(request, "test")
    if file is not None:
        os.environ[FILE_VARIABLES[request["task"]]] = file
    from evalplus.data import get_human_eval_plus, get_mbpp_plus

    load = {"humaneval": get_human_eval_plus, "mbpp": get_mbpp_plus}[request["task"]]
    return list(load().values())[: request["limit"]]


def prepare(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"problems": [prepare_problem(problem) for problem in load_problems(request)]}


def prepare_problem(problem: Problem) -> Mapping[str, Any]:
    content = f"{INSTRUCTION}\n```python\n{problem['prompt'].strip()}\n```"
    return {"id": problem["task_id"], "messages": [{"role": "user", "content": content}]}


def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
    problems = load_problems(request)
    answers: Mapping[str, Sequence[str]] = request["answers"]
    by_problem = list(zip(*answers.values(), strict=True))
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        tasks = [request["task"]] * len(problems)
        passed = list(pool.map(grade_answers, tasks, problems, by_problem))
    grades = {mode: list(of_mode) for mode, of_mode in zip(answers, zip(*passed, strict=True), strict=True)}
    return {"ids": [problem["task_id"] for problem in problems], "grades": grades}


def grade_answers(task: str, problem: Problem, answers: Sequence[str]) -> list[bool]:
    """Returns whether the program in each answer passes all tests of a problem."""
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec
    from evalplus.sanitize import sanitize

    reference = problem["prompt"] + problem["canonical_solution"]
    only_not_none = task == "mbpp" and problem["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS
    tests = []
    for name in ("base_input", "plus_input"):
        expected, seconds = trusted_exec(
            reference, problem[name], problem["entry_point"], record_time=True, output_not_none=only_not_none
        )
        tests.append((problem[name], expected, seconds))
    programs = [sanitize(answer, problem["entry_point"]) for answer in answers]
    passed = {program: passes_all(task, problem, program, tests) for program in dict.fromkeys(programs)}
    return [passed[program] for program in programs]


def passes_all(task: str, problem: Problem, program: str, tests: Iterable[tuple[Any, Any, Any]]) -> bool:
    from evalplus.eval import PASS, untrusted_check

    return all(
        untrusted_check(
            task,
            program,
            inputs,
            problem["entry_point"],
            expected=expected,
            atol=problem["atol"],
            ref_time=seconds,
            fast_check=True,
        )[0]
        == PASS
        for inputs, expected, seconds in tests
    )


if __name__ == "__main__":
    serve_request({"prepare": prepare, "grade": grade})
