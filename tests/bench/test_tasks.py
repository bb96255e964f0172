"""The tasks of lm-eval, evalplus and MT-Bench: a scripted server gives answers whose grades are known.

The data sets are a few handwritten problems in the format of the real ones.
"""

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from bench import quality
from bench.client import RequestResult, TimedResponse
from bench.tasks import environment, harness, judge
from bench.tasks.judge import JudgeOptions, RatedExchange, parse_score, rate_all, rated_exchanges
from bench.tasks.loading import HARNESS_TASKS, TaskOptions, load_task
from bench.tasks.mt_bench import MTBenchTask
from bench.tasks.task import BenchmarkProblem, ProblemAnswer, TaskUnavailable
from tests.bench.scripted_server import ScriptedAnswer, scripted_server

DATA = Path(__file__).parent / "task_data"

# A part of each problem's text, an answer that is right, and one that is wrong.
ANSWERS = {
    # gsm8k
    "fills 6 trays": ("6 * 7 = 42 rolls, minus 12. **30** rolls are left.", "6 * 7 - 12 = 31."),
    "A tent costs": ("Together they cost $1,250.", "Together they cost $450."),
    "9 carriages": ("720 seats, of which 180 are taken. The answer is 540.", "The answer is 180."),
    "reads 15 pages": ("195 / 15 = 13, so she needs 13 days.", "She needs 12 days."),
    # math500
    "What is $\\frac{3}{8}": ("It is $\\boxed{\\frac{1}{2}}$.", "It is $\\boxed{\\frac{4}{9}}$."),
    "Expand $(x+2)": (
        "Final Answer: The final answer is $x^2 - 3x - 10$. I hope it is correct.",
        "Final Answer: The final answer is $x^2 + 3x - 10$. I hope it is correct.",
    ),
    "choose 2 of 7": ("There are $\\boxed{21}$ ways.", "There are $\\boxed{42}$ ways."),
    "is $2^x=32$": ("Because $2^5 = 32$, it is $\\boxed{5}$.", "It is $\\boxed{16}$."),
    # mmlu_pro
    "does the whale live": ("Whales are animals of the sea. The answer is (D).", "The answer is (E)."),
    "record as tax": ("It is (D), so the answer is D.", "It is (D), or so. The answer is (A)."),
    "does helium have": ("The answer is (D).", "The answer is (F)."),
    "elements by index": ("An array. The answer is (D).", "I am not sure."),
    # humaneval
    "count_even": (
        "Sure:\n```python\ndef count_even(numbers):\n    return len([n for n in numbers if n % 2 == 0])\n```",
        # Only a test of evalplus notices that 0 is even.
        "```python\ndef count_even(numbers):\n    return len([n for n in numbers if n and n % 2 == 0])\n```",
    ),
    "shout": (
        "```python\ndef shout(text):\n    return f'{text.upper()}!'\n```\nIt adds a mark.",
        "```python\ndef shout(text):\n    return text\n```",
    ),
    "mean_of": (
        "```python\ndef mean_of(values):\n    return sum(v / len(values) for v in values)\n```",
        "```python\ndef mean_of(values):\n    while True:\n        pass\n```",
    ),
    "first_word": (
        "```python\ndef first_word(text):\n    words = text.split()\n    return words[0] if words else ''\n```",
        "```python\ndef first_word(text):\n    import os\n    os.system('true')\n    return text.split()[0]\n```",
    ),
    # mbpp
    "cube": ("```python\ndef cube(n):\n    return n * n * n\n```", "```python\ndef cube(n):\n    return 8\n```"),
    "remove_spaces": (
        "```python\ndef remove_spaces(text):\n    return ''.join(text.split(' '))\n```",
        "```python\ndef remove_spaces(text)\n    return text\n```",
    ),
}
# The problems that each mode answers wrongly.
WRONG = {
    "off": {"reads 15 pages", "What is $\\frac{3}{8}", "does helium have"},
    "full": {"A tent costs", "9 carriages", "does helium have", "elements by index", "count_even", "mean_of"},
    "rounds": {"remove_spaces", "first_word", "Expand $(x+2)", "choose 2 of 7"},
}


def script(body):
    last = body["messages"][-1]["content"]
    mode = body["parse"]["mode"]
    (part,) = [part for part in ANSWERS if part in last]
    text = ANSWERS[part][part in WRONG[mode]]
    draft_tokens = 0 if mode == "off" else 20
    return ScriptedAnswer(text, draft_tokens=draft_tokens, accepted_tokens=draft_tokens and 15)


# The figures for the modes full and rounds that follow from WRONG. Of each task: problems, problems that only mode off
# answers correctly, problems that only the other mode answers correctly, its accuracy, and p. McNemar's exact test
# gives 1 for one difference or for equal numbers, and 2 / 2**n if all n differences have the same direction.
EXPECTED = {
    ("gsm8k", "full"): (4, 2, 1, 0.5, 1.0),
    ("gsm8k", "rounds"): (4, 0, 1, 1.0, 1.0),
    ("math500", "full"): (4, 0, 1, 1.0, 1.0),
    ("math500", "rounds"): (4, 2, 1, 0.5, 1.0),
    ("mmlu_pro", "full"): (4, 1, 0, 0.5, 1.0),
    ("mmlu_pro", "rounds"): (4, 0, 1, 1.0, 1.0),
    ("humaneval", "full"): (4, 2, 0, 0.5, 0.5),
    ("humaneval", "rounds"): (4, 1, 0, 0.75, 1.0),
    ("mbpp", "full"): (2, 0, 0, 1.0, 1.0),
    ("mbpp", "rounds"): (2, 1, 0, 0.5, 1.0),
}
ACCURACY_OF_OFF = {"gsm8k": 0.75, "math500": 0.75, "mmlu_pro": 0.75, "humaneval": 1.0, "mbpp": 1.0}


def run_quality(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.quality", *map(str, arguments)])
    quality.main()


@pytest.fixture
def harnesses():
    """Installs the environment of lm-eval and evalplus at the first use."""
    try:
        return environment.install()
    except TaskUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_figures_of_each_task_are_those_of_the_scripted_answers(harnesses, monkeypatch, tmp_path, capsys):
    report, answers = tmp_path / "quality.json", tmp_path / "answers.jsonl"
    tasks = tuple(HARNESS_TASKS)
    with scripted_server(script) as url:
        run_quality(
            monkeypatch,
            *("--url", url, "--tasks", ",".join(tasks), "--modes", "off,full,rounds", "--limit", 4),
            *("--data-dir", DATA, "--json", report, "--answers", answers),
        )
    rows = {(each["task"], each["mode"]): each for each in json.loads(report.read_text())["rows"]}
    assert {task: rows[task, "off"]["accuracy"] for task in tasks} == ACCURACY_OF_OFF
    figures = "num_problems", "num_only_base_correct", "num_only_mode_correct", "accuracy", "p"
    assert {key: tuple(rows[key][name] for name in figures) for key in EXPECTED} == EXPECTED
    for (_, mode), each in rows.items():
        low, high = each["loss_interval"]
        assert low <= each["loss"] <= high and each["speedup"] > 0 and each["num_truncated"] == 0
        assert each["accepted_share"] == (None if mode == "off" else 0.75)
    assert "| gsm8k | 4 | full | 50.0% | 25.00 points |" in capsys.readouterr().out
    graded = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(graded) == 3 * sum(EXPECTED[task, "full"][0] for task in tasks)
    wrong = {(each["mode"], part) for each in graded for part in ANSWERS if each["answers"][0] in ANSWERS[part][1:]}
    assert wrong == {(mode, part) for mode, parts in WRONG.items() for part in parts}
    right = {answer for answer, _ in ANSWERS.values()}
    assert all(each["grade"] == (each["answers"][0] in right) for each in graded)


@pytest.mark.slow
def test_a_data_set_that_is_missing_or_has_another_format_is_named(harnesses, tmp_path):
    for task in (*HARNESS_TASKS, "mtbench"):
        with pytest.raises(TaskUnavailable, match=rf"^{task}: there is no {tmp_path}/{task}/"):
            load_task(task, TaskOptions(2, data_dir=str(tmp_path), judge=JudgeOptions("http://127.0.0.1:9")))
    file = tmp_path / "humaneval" / "test.jsonl"
    file.parent.mkdir()
    file.write_text('{"task_id": "HumanEval/0", "text": "def f(): ..."}\n')
    with pytest.raises(TaskUnavailable, match=r"^humaneval: .*not found in HumanEval"):
        load_task("humaneval", TaskOptions(2, data_dir=str(tmp_path)))


# MT-Bench. Its program needs no package to read a local file, so these tests need no environment.


@pytest.fixture
def without_harnesses(monkeypatch):
    monkeypatch.setattr(harness, "install", lambda: Path(sys.executable))


# The score of each answer, by mode and a part of the message. The answers to a follow-up have the score of "then".
SCORES = {
    "off": {"lighthouse": 8, "rain": 6, "17 times 3": 9, "youngest": 7},
    "full": {"lighthouse": 6, "rain": 6, "17 times 3": 10, "youngest": 1},
}
FOLLOW_UP_SCORES = {"off": 8, "full": 7}


def mt_bench_script(body):
    first, last = body["messages"][0]["content"], body["messages"][-1]["content"]
    if "Rating: <score>" in first:  # the judge
        quality_of_answer = re.findall(r"quality (\d+)", first)[-1]
        return ScriptedAnswer(f"The answer is so so. It deserves more than 1.\n\n**Rating: {quality_of_answer}/10**")
    mode = body["parse"]["mode"]
    scores = [score for part, score in SCORES[mode].items() if part in last] or [FOLLOW_UP_SCORES[mode]]
    return ScriptedAnswer(f"An answer of quality {scores[0]}", finish_reason="length" if mode == "full" else "stop")


def test_mt_bench_compares_the_mean_scores_of_both_answers(without_harnesses, monkeypatch, tmp_path, capsys):
    report = tmp_path / "quality.json"
    with scripted_server(mt_bench_script) as url:
        run_quality(
            monkeypatch,
            *("--url", url, "--judge", url, "--tasks", "mtbench", "--modes", "off,full", "--data-dir", DATA),
            *("--json", report),
        )
    off, full = json.loads(report.read_text())["rows"]
    # The means of both answers are 8, 7, 8.5, 7.5 for off and 6.5, 6.5, 8.5, 4 for full, so the losses are 1.5, 0.5, 0
    # and 3.5, with the mean 1.375 and the standard deviation 1.5478. With 3 degrees of freedom, t is 3.182.
    assert (off["mean_score"], full["mean_score"], full["loss"]) == (7.75, 6.375, 1.375)
    assert full["loss_interval"] == pytest.approx([1.375 - 3.182 * 1.5478 / 2, 1.375 + 3.182 * 1.5478 / 2], abs=1e-3)
    assert (full["num_base_better"], full["num_mode_better"]) == (3, 0)
    assert (off["num_problems"], off["num_truncated"], full["num_truncated"]) == (4, 0, 4)
    output = capsys.readouterr()
    assert "| mtbench | 4 | full | 6.38 of 10 | 1.38 | -1.09 to 3.84 |" in output.out
    assert "mtbench, mode full: 4 answers ended at the limit" in output.err and "mode off:" not in output.err


def test_problems_are_drawn_from_all_categories_in_turns(without_harnesses):
    task = load_task("mtbench", TaskOptions(3, data_dir=str(DATA), judge=JudgeOptions("http://127.0.0.1:9")))
    assert isinstance(task, MTBenchTask)
    assert [problem.id for problem in task.problems] == ["501", "503", "504"]
    assert task.problems[1].follow_ups == ("Add 9 to the result.",) and task.references[1] == ("51", "60")


def test_the_judge_sees_the_conversation_and_the_reference_of_each_answer():
    problem = BenchmarkProblem("1", ({"role": "user", "content": "What is 1 + 1?"},), ("And 1 + 2?",))
    first, second = rated_exchanges(problem, ("2", "3"), ProblemAnswer(("two", "three"), ended=True))
    assert first.messages == (("user", "What is 1 + 1?"), ("assistant", "two")) and first.reference == "2"
    assert second.messages == (*first.messages, ("user", "And 1 + 2?"), ("assistant", "three"))
    assert "<reference>\n3\n</reference>" in second.prompt() and "<assistant>\nthree\n</assistant>" in second.prompt()
    (without_reference, _) = rated_exchanges(problem, (), ProblemAnswer(("two", "three"), ended=True))
    assert "<reference>" not in without_reference.prompt()


def test_a_score_is_the_last_rating_within_the_scale():
    assert parse_score("A rating of 3 would be too low.\nRating: 8") == 8
    assert parse_score("rating: [[7.5]]") == 7.5 and parse_score("**Rating:** 10/10") == 10
    assert parse_score("Rating: 11") is None and parse_score("Rating: 0") is None and parse_score("It is good.") is None


def exchange(text):
    return RatedExchange((("user", "question"), ("assistant", text)), None)


def test_equal_answers_are_rated_once_and_answers_without_a_score_are_left_out():
    prompts = []

    def script(body):
        prompts.append(body["messages"][0]["content"])
        return ScriptedAnswer("Rating: 4" if "good" in prompts[-1].rsplit("<assistant>")[-1] else "I cannot say.")

    exchanges = [exchange("good"), exchange("bad"), exchange("good")]
    with scripted_server(script) as url:
        scores = asyncio.run(rate_all(JudgeOptions(url), exchanges))
    assert scores == {exchange("good"): 4} and len(prompts) == 2


def test_a_problem_without_a_score_is_left_out_for_all_modes():
    problems = tuple(BenchmarkProblem(name, ({"role": "user", "content": name},)) for name in ("1", "2"))
    answers = {"off": ("good", "good"), "full": ("good", "bad")}
    with scripted_server(lambda body: ScriptedAnswer("Rating: 4" if "bad" not in str(body) else "?")) as url:
        task = MTBenchTask("mtbench", problems, ((), ()), JudgeOptions(url))
        grades = asyncio.run(
            task.grade({mode: [ProblemAnswer((text,), True) for text in texts] for mode, texts in answers.items()})
        )
    assert grades.problem_ids == ("1",) and grades.by_mode == {"off": (4,), "full": (4,)}


def test_a_judge_that_fails_for_a_moment_is_called_again(monkeypatch):
    monkeypatch.setattr(judge, "RETRY_WAITS_S", (0.0, 0.0))
    errors = ["429", "503", None]

    async def send(client, params, request, scheduled_at):
        error = errors.pop(0)
        return RequestResult(request, 0.0, 1.0, None if error else TimedResponse("Rating: 9", True), error)

    monkeypatch.setattr(judge, "send_request", send)
    options = JudgeOptions("http://127.0.0.1:9", model="judge")
    assert asyncio.run(rate_all(options, [exchange("good")])) == {exchange("good"): 9}
    errors += ["401", None]
    with pytest.raises(TaskUnavailable, match="the judge failed: 401"):
        asyncio.run(rate_all(options, [exchange("good")]))


# What cannot be run is reported in one line.


def test_mt_bench_without_a_judge_is_rejected():
    with pytest.raises(TaskUnavailable, match=r"^mtbench: .*--judge must be set"):
        load_task("mtbench", TaskOptions(2))


def test_an_unknown_task_is_rejected_with_the_names_of_all_tasks():
    with pytest.raises(TaskUnavailable, match=r"^gms8k: is neither a file nor one of the tasks demo, gsm8k, math500"):
        load_task("gms8k", TaskOptions(2))


def test_every_task_is_checked_before_the_first_one_is_measured(monkeypatch):
    requests = []

    def script(body):
        requests.append(body)
        return ScriptedAnswer("text")

    with scripted_server(script) as url, pytest.raises(SystemExit, match=r"^bench\.quality: mtbench: .*--judge"):
        run_quality(monkeypatch, "--url", url, "--tasks", "demo,mtbench", "--limit", 1)
    assert requests == []


def test_a_program_that_fails_is_reported_with_its_last_line(without_harnesses, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "PROGRAMS", tmp_path)
    (tmp_path / "broken.py").write_text("import sys; sys.exit('first line\\nno space left')")
    with pytest.raises(TaskUnavailable, match=r"^gsm8k: no space left$"):
        harness.call_program("broken", "prepare", harness.ProblemSource("gsm8k", 2))


def test_a_program_receives_no_keys(without_harnesses, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "PROGRAMS", tmp_path)
    monkeypatch.setenv("PARSE_API_KEY", "secret")
    (tmp_path / "shows.py").write_text(
        "import json, os, sys; open(sys.argv[2], 'w').write(json.dumps({'names': list(os.environ)}))"
    )
    names = harness.call_program("shows", "prepare", harness.ProblemSource("gsm8k", 2))["names"]
    assert "PATH" in names and "PARSE_API_KEY" not in names


def test_a_failed_installation_is_reported(monkeypatch, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    interpreter.chmod(0o700)
    monkeypatch.setattr(environment, "CACHE", tmp_path)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(TaskUnavailable, match=r"^lm-eval and evalplus cannot be installed: no space left$"):
        environment.install()


def test_the_figures_of_finished_tasks_are_shown_before_a_failure(monkeypatch, tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "What is 2 + 2?", "answer": "4"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "fail", "answer": "4"}\n')

    def script(body):
        assert body["messages"][0]["content"] != "fail"
        return ScriptedAnswer("It is 4.")

    with scripted_server(script) as url, pytest.raises(SystemExit, match="a request failed: 500"):
        run_quality(monkeypatch, "--url", url, "--tasks", f"{problems},{broken}", "--modes", "off,full")
    assert f"| {problems} | 1 | full | 100.0% | 0.00 points |" in capsys.readouterr().out


def test_answers_are_kept_if_they_cannot_be_graded(without_harnesses, monkeypatch, tmp_path):
    answers = tmp_path / "answers.jsonl"

    def script(body):
        return ScriptedAnswer("no score" if "Rating: <score>" in str(body) else "An answer.")

    with scripted_server(script) as url, pytest.raises(SystemExit, match="mtbench: the judge has written no score"):
        run_quality(
            monkeypatch,
            *("--url", url, "--judge", url, "--tasks", "mtbench", "--modes", "off,full", "--limit", 1),
            *("--data-dir", DATA, "--answers", answers),
        )
    kept_answers = [json.loads(line) for line in answers.read_text().splitlines()]
    common = {"task": "mtbench", "problem": "501", "grade": None, "complete": True, "answers": ["An answer."] * 2}
    assert kept_answers == [{**common, "mode": mode} for mode in ("off", "full")]
