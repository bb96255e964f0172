from dataclasses import replace

import pytest

from bench.forward_passes import ForwardPass, PassRecords, PassTimeCurve
from bench.speedup_model import DecodingStats, break_even_tokens, decoding_stats, predict_speedup, speedup_by_depth
from parse.types import SpeculationStats

CURVE = PassTimeCurve(1, (1, 5, 9), (2.0, 4.0, 8.0))


WRITING = DecodingStats(
    passes=10,
    proposed=(8, 4),
    accepted=(6, 3),
    num_tokens=3.0,
    num_seqs=1.0,
    pass_s=3.0,
    num_proposal_requests=8,
    proposal_s=0.5,
)


def decoding_stats_with(**changes):
    return replace(WRITING, **changes)


def test_the_time_of_a_pass_is_interpolated_between_two_sizes():
    assert [CURVE.seconds_at(num_tokens) for num_tokens in (1, 3, 5, 7)] == [2.0, 3.0, 4.0, 6.0]


def test_the_median_of_curves_is_taken_at_each_size():
    curves = [PassTimeCurve(2, (1, 5), seconds) for seconds in ((1.0, 9.0), (2.0, 2.0), (7.0, 3.0))]
    assert PassTimeCurve.median(curves) == PassTimeCurve(2, (1, 5), (2.0, 3.0))


def test_a_pass_generates_the_accepted_tokens_and_one_more():
    assert decoding_stats_with().tokens_per_pass == pytest.approx(1.9)
    assert decoding_stats_with().acceptance_rates == [0.75, 0.75]


def test_statistics_count_one_sequence_in_a_pass():
    records = PassRecords((ForwardPass(2, 6, 1.0), ForwardPass(1, 3, 2.0)), ((2, 0.3),)) + PassRecords((), ((1, 0.3),))
    stats = decoding_stats(SpeculationStats("parallel", 3, (3, 3), (2, 1)), records)
    assert (stats.num_seqs, stats.num_tokens, stats.pass_s) == (1.5, 3.0, 1.5)
    assert (
        stats.num_proposal_requests == 3
        and stats.proposal_s == pytest.approx(0.2)
        and stats.proposal_s_per_pass == pytest.approx(0.2)
    )


def test_no_proposal_requests_take_no_time():
    stats = decoding_stats(SpeculationStats("ngram", 2, (), ()), PassRecords((ForwardPass(1, 1, 1.0),)))
    assert stats.proposal_s_per_pass == stats.proposal_s == 0.0 and stats.tokens_per_pass == 1.0


def test_the_break_even_tokens_match_a_calculation_by_hand():
    assert break_even_tokens(decoding_stats_with(), CURVE) == pytest.approx(
        (3.0 + 8 * 0.5 / 10) / 2.0
    )  # a pass over 3 entries, 8 proposals in 10


def test_the_predicted_speedup_matches_a_calculation_by_hand():
    # Two answers; plain: prompts and 17 more passes of a token; with the method: prompts and 8 more passes.
    assert predict_speedup(decoding_stats_with(), CURVE, 19, 2, 5.0) == pytest.approx((10 + 17 * 2) / (10 + 8 * 3.4))


def test_without_prompts_the_speedup_is_tokens_per_pass_over_break_even_tokens():
    stats = decoding_stats_with()
    plain = round(stats.passes * stats.tokens_per_pass)
    assert predict_speedup(stats, CURVE, plain, 0, 5.0) == pytest.approx(
        stats.tokens_per_pass / break_even_tokens(stats, CURVE)
    )


def test_every_depth_has_a_speedup_of_its_own():
    shallow, deep = speedup_by_depth(decoding_stats_with(), CURVE, "parallel", 0.5)
    assert shallow == pytest.approx(1.75 * 2 / (2.5 + 0.5))
    assert deep == pytest.approx(2.5 * 2 / (3.0 + 0.5))


def test_no_token_is_accepted_after_a_rejected_one():
    _, deep = speedup_by_depth(
        decoding_stats_with(proposed=(8, 1), accepted=(6, 1)), CURVE, "parallel", 0.5
    )  # proposed once, where acceptance was certain
    assert deep == pytest.approx(2.5 * 2 / (3.0 + 0.5))


def test_every_token_of_a_sequential_method_takes_a_step():
    assert (
        decoding_stats_with().step_s("eagle3") == pytest.approx(8 * 0.5 / 12)
        and decoding_stats_with().step_s("parallel") == 0.5
    )
    shallow, deep = speedup_by_depth(decoding_stats_with(), CURVE, "eagle3", 0.4)
    assert shallow == pytest.approx(1.75 * 2 / (2.5 + 0.4))
    assert deep == pytest.approx(2.5 * 2 / (3.0 + 0.8))


def test_with_many_sequences_the_times_of_proposals_add_up():
    crowd = PassTimeCurve(4, (1, 5), (4.0, 12.0))
    shallow, _ = speedup_by_depth(decoding_stats_with(), crowd, "parallel", 0.5)
    assert shallow == pytest.approx(1.75 * 4 / (6.0 + 2.0))


def test_requests_without_a_proposal_cost_time_only():
    shallow, _ = speedup_by_depth(decoding_stats_with(num_proposal_requests=16), CURVE, "ngram", 0.1)
    assert shallow == pytest.approx(1.375 * 2 / (2.25 + 0.1))


def test_a_method_without_proposals_has_no_depths():
    assert speedup_by_depth(decoding_stats_with(proposed=(), accepted=()), CURVE, "ngram", 0.1) == []
