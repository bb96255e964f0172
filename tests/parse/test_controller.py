"""When drafting is switched off, and on again: from the figures alone."""

import pytest

from parse.controller import INITIAL_PAUSE, MAX_PAUSE, MIN_OBSERVATIONS, DraftingController, DraftingOutcome

GOOD = DraftingOutcome(
    draft_tokens=100, accepted_tokens=80, target_tokens=20, total_s=0.3, target_s=0.2
)  # alone it would have taken 1 s
BAD = DraftingOutcome(draft_tokens=100, accepted_tokens=0, target_tokens=100, total_s=1.2, target_s=1.0)


def asked(control, count, outcome):
    """Answers that many requests; how many of them were drafted for."""
    drafted = 0
    for _ in range(count):
        if control.decide().draft:
            drafted += 1
            control.learn(outcome)
        else:
            control.learn(DraftingOutcome(0, 0, 100, 1.0, 1.0))
    return drafted


def test_drafting_that_pays_goes_on():
    control = DraftingController()
    assert asked(control, 100, GOOD) == 100
    assert control.gain == pytest.approx(0.7, abs=0.01)  # (80 tokens at 10 ms - 0.1 s) / 1 s


def test_drafting_that_does_not_pay_is_tried_ever_more_seldom():
    control = DraftingController()
    assert asked(control, MIN_OBSERVATIONS, BAD) == MIN_OBSERVATIONS
    decisions = []
    for _ in range(1000):
        decision = control.decide()
        decisions.append(decision.draft)
        control.record(BAD if decision.draft else DraftingOutcome(0, 0, 100, 1.0, 1.0))
    trials = [k for k, drafted in enumerate(decisions) if drafted]
    pauses = [b - a - 1 for a, b in zip([-1, *trials], trials, strict=False)]
    assert pauses == [min(INITIAL_PAUSE * 2**k, MAX_PAUSE) for k in range(len(pauses))]


def test_it_is_on_again_when_a_trial_pays():
    control = DraftingController()
    asked(control, MIN_OBSERVATIONS + INITIAL_PAUSE, BAD)
    assert control.decide().draft
    control.record(GOOD)
    assert asked(control, 50, GOOD) == 50


def test_a_trial_that_barely_pays_does_not_switch_it_on():
    control = DraftingController()
    asked(control, MIN_OBSERVATIONS + INITIAL_PAUSE, BAD)
    assert control.decide().draft
    control.record(
        DraftingOutcome(draft_tokens=100, accepted_tokens=25, target_tokens=75, total_s=0.95, target_s=0.75)
    )  # saves 5%
    assert not control.decide().draft


def test_one_bad_draft_among_good_ones_changes_nothing():
    control = DraftingController()
    for _ in range(20):
        assert asked(control, 9, GOOD) == 9
        control.record(BAD)
    assert control.decide().draft


def test_while_the_target_has_written_nothing_its_pace_is_unknown_and_drafting_goes_on():
    control = DraftingController()
    whole = DraftingOutcome(draft_tokens=100, accepted_tokens=100, target_tokens=0, total_s=0.3, target_s=0.0)
    assert asked(control, 20, whole) == 20
    assert control.gain is None and "weighed" in control.summary()


def test_another_round_is_worth_what_it_is_expected_to_save():
    control = DraftingController()
    assert control.another_round_pays(10)  # nothing is known: try
    assert not control.another_round_pays(0)
    asked(control, 2, GOOD)  # a drafted token costs 1 ms and saves 0.8 * 10 ms
    assert control.another_round_pays(10)
    worse = DraftingController()
    asked(worse, 2, BAD)
    assert not worse.another_round_pays(10)


def test_the_first_request_counts_for_nothing_whatever_it_took():
    control = DraftingController()
    control.record(DraftingOutcome(draft_tokens=100, accepted_tokens=80, target_tokens=20, total_s=60.0, target_s=0.2))
    assert asked(control, 20, GOOD) == 20
    assert control.gain is not None and control.gain > 0


def test_every_decision_is_explained_by_figures():
    control = DraftingController()
    asked(control, MIN_OBSERVATIONS, BAD)
    reason = control.decide().reason
    assert "-20%" in reason and "0% acceptance" in reason and f"{INITIAL_PAUSE - 1} requests" in reason
