"""The comparison of modes finds a loss that is there, and states how large it can be."""

import json
import math
import random
from fractions import Fraction
from itertools import product

import pytest

from bench import quality
from bench.paired_outcomes import PairedOutcomes
from bench.quality import ModeResults, compare
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


@pytest.mark.parametrize(("num_problems", "loss"), [(40, 0.0), (40, 0.03), (200, 0.02)])
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
    base = ModeResults(correct=[True, True, False, True], seconds=[2.0, 6.0, 4.0])
    other = ModeResults(correct=[True, False, False, True], seconds=[1.0, 2.0, 4.0])
    other.draft_tokens, other.accepted_tokens = 40, 30
    compared = compare(base, other)
    assert (compared["accuracy"], compared["loss"], compared["speedup"]) == (0.5, 0.25, 2.0)
    assert (compared["num_only_base_correct"], compared["num_only_mode_correct"]) == (1, 0)
    assert compared["accepted_share"] == 0.75


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
    from bench.client import RequestResult
    from bench.workload import SampleRequest

    failed = RequestResult(SampleRequest([]), 0.0, 1.0, error="503", detail="no place")
    with pytest.raises(quality.TooManyErrors, match="503 no place"):
        ModeResults().add([failed], 1.0)
