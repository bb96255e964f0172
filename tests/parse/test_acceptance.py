import pytest

from parse.acceptance import Thresholds, accepted_prefix_length
from parse.types import RequestError

HALF = Thresholds(0.5, 0.5)


def test_a_full_answer_that_passes_is_kept_whatever_its_prefixes_say():
    assert accepted_prefix_length([4, 8, 10], [0.1, 0.9, 0.6], HALF, ended=True) == 10


def test_else_the_last_prefix_before_the_first_failure_is_kept():
    assert accepted_prefix_length([4, 8, 12, 14], [0.9, 0.2, 0.9, 0.1], HALF, ended=True) == 4


def test_nothing_is_kept_when_the_first_prefix_fails():
    assert accepted_prefix_length([4, 8], [0.4, 0.9], HALF, ended=False) == 0


def test_a_draft_that_was_cut_off_has_no_full_answer_to_accept():
    assert accepted_prefix_length([4, 8], [0.2, 0.9], HALF, ended=False) == 0
    assert accepted_prefix_length([4, 8], [0.9, 0.9], HALF, ended=False) == 8


def test_no_cuts_keep_nothing():
    assert accepted_prefix_length([], [], HALF, ended=True) == 0


def test_the_two_thresholds_are_separate_and_inclusive():
    strict = Thresholds(full=0.9, prefix=0.5)
    assert accepted_prefix_length([4, 8], [0.5, 0.8], strict, ended=True) == 4
    assert accepted_prefix_length([4, 8], [0.5, 0.9], strict, ended=True) == 8


def test_what_was_not_asked_does_not_pass():
    assert accepted_prefix_length([4, 8, 10], [0.9, None, None], HALF, ended=True) == 4
    assert accepted_prefix_length([4, 8, 10], [None, None, 0.9], HALF, ended=True) == 10


def test_the_longest_passing_prefix_is_kept_under_the_other_rule():
    assert accepted_prefix_length([4, 8, 12, 14], [0.9, 0.2, 0.9, 0.1], HALF, ended=True, rule="longest_passing") == 12


def test_a_threshold_that_is_no_probability_is_refused():
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(RequestError, match=r"thresholds\.prefix"):
            Thresholds(prefix=value)
