"""The comparison of modes finds a loss that is there, and states how large it can be."""

import asyncio
import json
import math
import random
from fractions import Fraction
from itertools import product

import pytest

from bench import quality
from bench.client import RequestResult, ServerReport, TimedResponse
from bench.paired_outcomes import PairedOutcomes
from bench.quality import MeasurementOptions, ModeResults, compare
from bench.tasks.local import LocalTask, demo_task
from bench.tasks.task import BenchmarkProblem, Grades, ProblemAnswer
from bench.workload import InvalidPromptFile, load_problems

NUM_REPETITIONS = 20


def draw_pairs(generator, num_problems, loss, disagreement=0.04):
    """Answers of two ways. One of them loses this share of correct answers."""
    base, other = [], []
    for _ in range(num_problems):
        draw = generator.random()
        is_correct = generator.random() < 0.9
        only_base, only_other = (disagreement + loss) / 2, (disagreement - loss) / 2
        base.append(draw < only_base or (draw >= only_base + only_other and is_correct))
        other.append(only_base <= draw < only_base + only_other or (draw >= only_base + only_other and is_correct))
    return base, other


def test_a_loss_of_three_points_is_found_and_covered():
    generator = random.Random(5)
    num_significant = covered = 0
    for _ in range(NUM_REPETITIONS):
        outcomes = PairedOutcomes.of(*draw_pairs(generator, 2000, 0.03))
        low, high = outcomes.interval()
        num_significant += outcomes.p_value() < 0.05 and outcomes.loss > 0
        covered += low <= 0.03 <= high
    assert num_significant >= 18 and covered >= 18


def test_no_loss_is_rarely_taken_for_one():
    generator = random.Random(6)
    significant = sum(PairedOutcomes.of(*draw_pairs(generator, 300, 0.0)).p_value() < 0.05 for _ in range(400))
    assert significant <= 20


@pytest.mark.parametrize(("num_problems", "loss"), [(40, 0.0), (40, 0.03), (200, 0.02), (2000, 0.03)])
def test_the_interval_contains_the_loss_as_often_as_it_says(num_problems, loss):
    generator = random.Random(7)
    num_trials = 1000
    covered = 0
    for _ in range(num_trials):
        low, high = PairedOutcomes.of(*draw_pairs(generator, num_problems, loss)).interval()
        covered += low <= loss <= high
    assert covered / num_trials > 0.925


@pytest.mark.parametrize("only_base", range(5))
@pytest.mark.parametrize("only_other", range(5))
def test_the_p_value_is_that_of_all_sequences_of_differences(only_base, only_other):
    num_different = only_base + only_other
    gap = abs(only_base - only_other)
    sequences = list(product((1, -1), repeat=num_different))
    expected = Fraction(sum(abs(sum(sequence)) >= gap for sequence in sequences), len(sequences))
    assert PairedOutcomes(10, only_base, only_other, 10).p_value() == pytest.approx(float(expected))


def test_for_many_problems_the_interval_is_the_usual_one():
    outcomes = PairedOutcomes(80_000, 6_000, 4_000, 10_000)
    n, loss = 100_000, 0.02
    deviation = math.sqrt((0.1 - loss**2) / n)
    assert outcomes.interval() == pytest.approx((loss - 1.96 * deviation, loss + 1.96 * deviation), abs=1e-5)


def test_without_any_difference_the_interval_shrinks_with_the_number_of_problems():
    bounds = [PairedOutcomes(n, 0, 0, 0).interval() for n in (10, 100, 1000)]
    assert [low < 0 < high for low, high in bounds] == [True] * 3
    # The chance of no difference in n problems is below 5% if more than about 3.8/n of them differ.
    assert [high for _, high in bounds] == pytest.approx([3.84 / (n + 3.84) for n in (10, 100, 1000)], rel=1e-3)


def test_speed_and_loss_are_those_of_pairs():
    task = LocalTask("task", (), ())
    base = ModeResults(answers=[ProblemAnswer(("text",), ended=True)] * 4, seconds=[2.0, 6.0, 4.0])
    other = ModeResults(answers=[ProblemAnswer(("text",), ended=False)] * 4, seconds=[1.0, 2.0, 4.0])
    other.draft_tokens, other.accepted_tokens = 40, 30
    grades = Grades(("1", "2", "3", "4"), {"off": (1, 1, 0, 1), "full": (1, 0, 0, 1)})
    of_base, compared = compare(task, {"off": base, "full": other}, grades)
    assert (compared["accuracy"], compared["loss"], compared["speedup"]) == (0.5, 0.25, 2.0)
    assert (compared["num_only_base_correct"], compared["num_only_mode_correct"]) == (1, 0)
    assert compared["accepted_share"] == 0.75 and compared["num_truncated"] == 4
    assert (of_base["accuracy"], of_base["loss"], of_base["p"], of_base["speedup"]) == (0.75, 0, 1, 1)
    assert of_base["accepted_share"] is None and of_base["num_truncated"] == 0


def test_the_result_of_an_answer_is_the_last_match(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"prompt": "What is 40 plus 2?", "answer": "42"}) + "\n")

    def is_correct(text, result=None):
        (problem,) = load_problems(file, result)
        assert problem.is_correct is not None
        return problem.is_correct(text, True)

    assert is_correct("40 plus 2 is 42.", r"\d+") and not is_correct("It is 42, not 43.", r"\d+")
    assert not is_correct("It is 420.", r"\d+") and is_correct("It is 420.")
    assert is_correct("First 40, then 2.\n#### 42", r"#### (\d+)") and not is_correct("42", r"#### (\d+)")


def test_a_problem_without_an_answer_is_named(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(InvalidPromptFile, match="problem 2 has no answer"):
        load_problems(file)


def test_a_failed_request_ends_the_comparison():
    async def send(params, request):
        return RequestResult(request, 0.0, 1.0, error="503", detail="no place")

    with pytest.raises(quality.NoAnswer, match="503 no place"):
        asyncio.run(quality.measure(send, "model", demo_task(3, seed=1), MeasurementOptions(("off",))))


def test_a_follow_up_is_sent_after_the_answer_to_the_message_before_it():
    bodies = []

    async def send(params, request):
        bodies.append(params.body(request))
        report = ServerReport("full", "none", 10, 4 + len(bodies), 0, 0.0, ())
        return RequestResult(request, 0.0, 1.0, TimedResponse(f"answer {len(bodies)}", len(bodies) == 1, report=report))

    first = {"role": "user", "content": "first"}
    problem = BenchmarkProblem("1", (first,), follow_ups=("second",), stop=("Q:",))
    task = LocalTask("task", (problem,), (), max_tokens=7)
    results = asyncio.run(quality.measure(send, "model", task, MeasurementOptions(("full",))))
    conversation = [first, {"role": "assistant", "content": "answer 1"}, {"role": "user", "content": "second"}]
    assert [list(body["messages"]) for body in bodies] == [[first], conversation]
    assert all(body["stop"] == ["Q:"] and body["max_tokens"] == 7 for body in bodies)
    assert results["full"].answers == [ProblemAnswer(("answer 1", "answer 2"), ended=False)]
    assert (results["full"].draft_tokens, results["full"].accepted_tokens) == (20, 5 + 6)
