import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from parse.acceptance import (
    AcceptancePolicy,
    Thresholds,
    accepted_prefix_length,
    next_batch,
    search_batch_size,
)
from parse.errors import RequestError
from parse.prompts import VerificationSuffix
from parse.requests import VerifyAndGenerateRequest, VerifyRequest
from parse.types import SamplingParams, VerifyResult

HALF = AcceptancePolicy(Thresholds(0.5, 0.5))
KEEP_ANY_PASSING = AcceptancePolicy(Thresholds(0.5, 0.5), "longest_passing")


def test_a_full_answer_that_passes_is_kept_whatever_its_prefixes_say():
    assert accepted_prefix_length([4, 8, 10], [0.1, 0.9, 0.6], HALF, complete=True) == 10


def test_else_the_last_prefix_before_the_first_failure_is_kept():
    assert accepted_prefix_length([4, 8, 12, 14], [0.9, 0.2, 0.9, 0.1], HALF, complete=True) == 4


def test_a_complete_answer_that_fails_its_own_threshold_is_no_prefix():
    policy = AcceptancePolicy(Thresholds(full=0.97, prefix=0.9))
    assert accepted_prefix_length([4], [0.95], policy, complete=True) == 0
    assert accepted_prefix_length([4, 8], [0.95, 0.95], policy, complete=True) == 4


def test_nothing_is_kept_when_the_first_prefix_fails():
    assert accepted_prefix_length([4, 8], [0.4, 0.9], HALF, complete=False) == 0


def test_a_draft_that_was_cut_off_has_no_full_answer_to_accept():
    assert accepted_prefix_length([4, 8], [0.2, 0.9], HALF, complete=False) == 0
    assert accepted_prefix_length([4, 8], [0.9, 0.9], HALF, complete=False) == 8


@pytest.mark.parametrize("rule", ["first_failure", "longest_passing"])
def test_a_prefix_that_was_not_evaluated_passes_no_threshold(rule):
    """Not even 0, which every other prefix passes."""
    policy = AcceptancePolicy(Thresholds(0.0, 0.0), rule)
    assert accepted_prefix_length([4, 8], [None, None], policy, complete=True) == 0
    assert accepted_prefix_length([4, 8], [0.0, None], policy, complete=True) == 4


def test_without_a_passing_prefix_the_longest_passing_one_is_empty():
    assert accepted_prefix_length([4, 8], [0.4, 0.2], KEEP_ANY_PASSING, complete=False) == 0


def test_a_policy_has_no_limit_of_the_answer_mass_by_default():
    assert AcceptancePolicy().min_answer_mass == 0


def test_without_prefixes_nothing_is_kept():
    assert accepted_prefix_length([], [], HALF, complete=True) == 0


def test_the_two_thresholds_are_separate_and_inclusive():
    strict = AcceptancePolicy(Thresholds(full=0.9, prefix=0.5))
    assert accepted_prefix_length([4, 8], [0.5, 0.8], strict, complete=True) == 4
    assert accepted_prefix_length([4, 8], [0.5, 0.9], strict, complete=True) == 8


def test_a_prefix_that_was_not_evaluated_does_not_pass():
    assert accepted_prefix_length([4, 8, 10], [0.9, None, None], HALF, complete=True) == 4
    assert accepted_prefix_length([4, 8, 10], [None, None, 0.9], HALF, complete=True) == 10


def test_the_longest_passing_prefix_is_kept_under_the_other_rule():
    assert accepted_prefix_length([4, 8, 12, 14], [0.9, 0.2, 0.9, 0.1], KEEP_ANY_PASSING, complete=True) == 12


def test_a_threshold_that_is_no_probability_is_refused():
    values: tuple[Any, ...] = (-0.1, 1.1, float("nan"), "0.5", None, True)
    for value in values:
        with pytest.raises(RequestError, match=r"thresholds\.prefix"):
            Thresholds(prefix=value)


def evaluate(p_correct, policy, *, complete, max_batch, answer_first):
    """The probabilities that are evaluated, in the order that `next_batch` asks for, and the number of batches."""
    evaluated: dict[int, float] = {}
    batches = 0
    while batch := next_batch(
        len(p_correct), evaluated, policy, complete=complete, max_batch=max_batch, answer_first=answer_first
    ):
        assert batch == sorted(set(batch)) and len(batch) <= max_batch and not evaluated.keys() & set(batch)
        evaluated.update((index, p_correct[index]) for index in batch)
        batches += 1
    return [evaluated.get(index) for index in range(len(p_correct))], batches


@pytest.mark.parametrize("answer_first", [False, True])
@pytest.mark.parametrize("max_batch", [1, 2, 100])
def test_what_is_left_out_of_the_evaluation_never_changes_the_result(answer_first, max_batch):
    """Held against evaluating everything, under random thresholds, rules and probabilities."""
    rng = random.Random(3)
    skipped = 0
    for _ in range(500):
        p_correct = [rng.random() for _ in range(rng.randint(0, 6))]
        lengths = list(range(1, len(p_correct) + 1))
        policy = AcceptancePolicy(
            Thresholds(rng.random(), rng.random()), rng.choice(["first_failure", "longest_passing"])
        )
        complete = rng.random() < 0.5
        evaluated, _ = evaluate(p_correct, policy, complete=complete, max_batch=max_batch, answer_first=answer_first)
        assert accepted_prefix_length(lengths, evaluated, policy, complete=complete) == accepted_prefix_length(
            lengths, p_correct, policy, complete=complete
        )
        skipped += evaluated.count(None)
    assert skipped > 0 or (max_batch > 6 and not answer_first)


@pytest.mark.parametrize("max_batch", [2, 5, 64])
def test_a_search_finds_the_same_prefix_whether_or_not_the_answer_is_evaluated_first(max_batch):
    """Also if P(correct) is not monotonic, where a search can differ from evaluating all prefixes."""
    rng = random.Random(4)
    policy = AcceptancePolicy(Thresholds(0.9, 0.5), exhaustive=False)
    num_searches = 0
    for _ in range(500):
        p_correct = [rng.random() for _ in range(rng.randint(1, 80))]
        kept_lengths = []
        for answer_first in (False, True):
            evaluated: dict[int, float] = {}
            while batch := next_batch(
                len(p_correct),
                evaluated,
                policy,
                complete=True,
                max_batch=max_batch,
                answer_first=answer_first,
                batch_seconds=lambda size: 4.0 + size,
            ):
                assert len(batch) <= max_batch and not evaluated.keys() & set(batch)
                evaluated |= {index: p_correct[index] for index in batch}
            lengths = sorted(evaluated)
            kept = [evaluated[index] for index in lengths]
            kept_lengths.append(accepted_prefix_length([n + 1 for n in lengths], kept, policy, complete=True))
            num_searches += len(evaluated) < len(p_correct)
        assert kept_lengths[0] == kept_lengths[1]
    assert num_searches > 500


def test_a_complete_answer_is_evaluated_alone_only_where_that_saves_work():
    p_correct = [0.1, 0.9, 0.9]
    assert evaluate(p_correct, HALF, complete=True, max_batch=9, answer_first=True) == ([None, None, 0.9], 1)
    assert evaluate(p_correct, HALF, complete=True, max_batch=9, answer_first=False) == (p_correct, 1)
    assert evaluate(p_correct, HALF, complete=True, max_batch=2, answer_first=False) == ([0.1, None, 0.9], 1)


def test_evaluation_stops_at_a_failure_only_if_the_rule_ignores_what_follows():
    p_correct = [0.9, 0.1, 0.9, 0.9]
    one_at_a_time = dict(max_batch=1, answer_first=False)
    assert evaluate(p_correct, HALF, complete=False, **one_at_a_time) == ([0.9, 0.1, None, None], 2)
    assert evaluate(p_correct, KEEP_ANY_PASSING, complete=False, **one_at_a_time) == (p_correct, 4)
    assert evaluate([0.9, 0.1, 0.9, 0.1], HALF, complete=True, **one_at_a_time) == ([0.9, 0.1, None, 0.1], 3)


def test_without_a_policy_every_prefix_is_evaluated():
    assert evaluate([0.1, 0.9, 0.9], None, complete=True, max_batch=2, answer_first=True) == ([0.1, 0.9, 0.9], 2)


def by_tokens(size):
    """The cost of a batch where it depends on the number of tokens."""
    return 1.0 + size


def search(p_correct, policy, batch_seconds, *, complete=False, max_batch=100):
    """Returns the accepted prefix length of a search, the sizes of its batches, and which prefixes were evaluated."""
    evaluated: dict[int, float] = {}
    sizes = []
    while batch := next_batch(
        len(p_correct),
        evaluated,
        policy,
        complete=complete,
        max_batch=max_batch,
        answer_first=True,
        batch_seconds=batch_seconds,
    ):
        assert batch == sorted(set(batch)) and len(batch) <= max_batch and not evaluated.keys() & set(batch)
        evaluated.update((index, p_correct[index]) for index in batch)
        sizes.append(len(batch))
    result = VerifyResult(
        tuple(evaluated.get(index) for index in range(len(p_correct))),
        answer_mass=tuple(1.0 if index in evaluated else None for index in range(len(p_correct))),
    )
    request = VerifyAndGenerateRequest(
        verify=VerifyRequest(
            prompt_token_ids=[1],
            draft_token_ids=[1] * len(p_correct),
            prefix_lengths=range(1, len(p_correct) + 1),
            suffix=VerificationSuffix((1,), (2,), (3,)),
            draft_complete=complete,
            policy=policy,
        ),
        sampling_params=SamplingParams(),
    )
    return request.accepted_prefix_length(result), sizes, evaluated


SEARCHING = AcceptancePolicy(Thresholds(0.5, 0.5), exhaustive=False)


@pytest.mark.parametrize("max_batch", [1, 3, 100])
@pytest.mark.parametrize("complete", [True, False])
def test_a_search_finds_the_first_failure_if_all_longer_prefixes_fail(complete, max_batch):
    for num_prefixes in range(1, 70):
        for first_failure in range(num_prefixes + 1):
            p_correct = [0.9] * first_failure + [0.1] * (num_prefixes - first_failure)
            accepted, _, _ = search(p_correct, SEARCHING, by_tokens, complete=complete, max_batch=max_batch)
            assert accepted == first_failure


def test_a_search_accepts_only_prefixes_that_pass():
    """The accepted prefix and the evaluated ones before it pass, and the next one fails."""
    rng = random.Random(5)
    for _ in range(300):
        p_correct = [rng.random() for _ in range(rng.randint(1, 40))]
        accepted, _, evaluated = search(p_correct, SEARCHING, by_tokens)
        assert all(evaluated[index] >= 0.5 for index in evaluated if index < accepted)
        assert accepted == 0 or accepted - 1 in evaluated
        assert accepted == len(p_correct) or evaluated[accepted] < 0.5


def test_a_search_evaluates_few_prefixes_where_tokens_are_expensive():
    _, sizes, evaluated = search([0.9] * 60 + [0.1] * 68, SEARCHING, by_tokens)
    assert len(evaluated) < 20 and len(sizes) > 2


def test_all_prefixes_are_evaluated_at_once_where_only_passes_cost_time():
    _, sizes, _ = search([0.9] * 60 + [0.1] * 68, SEARCHING, lambda size: 1.0, max_batch=200)
    assert sizes == [128]


def test_the_number_of_prefixes_evaluated_first_takes_the_least_time():
    """Compared with every possible number, when the search goes on in the largest part that is left."""

    @cache
    def best_seconds(num_prefixes):
        return min((seconds_with(num_prefixes, size) for size in range(1, num_prefixes + 1)), default=0.0)

    def seconds_with(num_prefixes, size):
        return 3.0 + size + best_seconds(num_prefixes // (size + 1))

    for num_prefixes in range(1, 33):  # all numbers up to 4 and the most useful larger ones are tried
        size = search_batch_size(num_prefixes, 100, lambda size: 3.0 + size)
        assert seconds_with(num_prefixes, size) <= 1.05 * best_seconds(num_prefixes)


@pytest.mark.parametrize(
    "policy", [AcceptancePolicy(Thresholds(0.5, 0.5), exhaustive=True), replace(KEEP_ANY_PASSING, exhaustive=False)]
)
def test_nothing_is_searched_if_all_prefixes_matter(policy):
    p_correct = [0.9, 0.1, 0.9, 0.9, 0.1, 0.1, 0.9, 0.1]
    accepted, sizes, _ = search(p_correct, policy, by_tokens)
    assert sizes == [8]
    assert accepted == accepted_prefix_length(range(1, 9), p_correct, policy, complete=False)
