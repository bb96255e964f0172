"""When drafting is switched off, and on again: from the figures alone."""

from dataclasses import replace

import pytest

from parse.controller import INITIAL_PAUSE, MAX_PAUSE, MIN_OBSERVATIONS, DraftingController, DraftingOutcome

GOOD = DraftingOutcome(
    draft_tokens=100, accepted_tokens=80, target_tokens=20, total_s=0.3, target_s=0.2
)  # alone it would have taken 1 s
ALONE = DraftingOutcome(draft_tokens=0, accepted_tokens=0, target_tokens=100, total_s=1.0, target_s=1.0)
BAD = DraftingOutcome(draft_tokens=100, accepted_tokens=0, target_tokens=100, total_s=1.2, target_s=1.0)


def drafted_for(controller, count, outcome):
    """Answers that many requests; how many of them were drafted for."""
    num_drafts = 0
    for _ in range(count):
        decision = controller.decide(may_be_trial=True)
        if decision.draft:
            num_drafts += 1
            controller.record(outcome, is_trial=decision.is_trial)
        else:
            controller.record(ALONE)
    return num_drafts


def test_drafting_that_pays_goes_on():
    controller = DraftingController()
    assert drafted_for(controller, 100, GOOD) == 100
    assert controller.gain == pytest.approx(0.7, abs=0.01)  # (80 tokens at 10 ms - 0.1 s) / 1 s


def test_drafting_that_does_not_pay_is_tried_ever_more_seldom():
    controller = DraftingController()
    assert drafted_for(controller, MIN_OBSERVATIONS, BAD) == MIN_OBSERVATIONS
    decisions = []
    for _ in range(1000):
        decision = controller.decide(may_be_trial=True)
        decisions.append(decision.draft)
        controller.record(BAD if decision.draft else ALONE, is_trial=decision.is_trial)
    trials = [k for k, drafted in enumerate(decisions) if drafted]
    pauses = [b - a - 1 for a, b in zip([-1, *trials], trials, strict=False)]
    assert pauses == [min(INITIAL_PAUSE * 2**k, MAX_PAUSE) for k in range(len(pauses))]


def test_it_is_on_again_when_a_trial_pays():
    controller = DraftingController()
    drafted_for(controller, MIN_OBSERVATIONS + INITIAL_PAUSE, BAD)
    assert controller.decide(may_be_trial=True).is_trial
    controller.record(GOOD, is_trial=True)
    assert drafted_for(controller, 50, GOOD) == 50


def test_a_trial_that_barely_pays_does_not_switch_it_on():
    controller = DraftingController()
    drafted_for(controller, MIN_OBSERVATIONS + INITIAL_PAUSE, BAD)
    assert controller.decide(may_be_trial=True).is_trial
    controller.record(
        DraftingOutcome(draft_tokens=100, accepted_tokens=25, target_tokens=75, total_s=0.95, target_s=0.75),
        is_trial=True,
    )  # saves 5%
    assert not controller.decide(may_be_trial=True).draft


def test_one_bad_draft_among_good_ones_changes_nothing():
    controller = DraftingController()
    for _ in range(20):
        assert drafted_for(controller, 9, GOOD) == 9
        controller.record(BAD)
    assert controller.decide(may_be_trial=True).draft


def test_while_the_target_has_written_nothing_its_pace_is_unknown_and_drafting_goes_on():
    controller = DraftingController()
    fully_accepted = DraftingOutcome(draft_tokens=100, accepted_tokens=100, target_tokens=0, total_s=0.3, target_s=0.0)
    assert drafted_for(controller, 20, fully_accepted) == 20
    assert controller.gain is None and "measured" in controller.summary()


def test_the_first_request_counts_for_nothing_whatever_it_took():
    controller = DraftingController()
    controller.record(
        DraftingOutcome(draft_tokens=100, accepted_tokens=80, target_tokens=20, total_s=60.0, target_s=0.2)
    )
    assert drafted_for(controller, 20, GOOD) == 20
    assert controller.gain is not None and controller.gain > 0


def test_every_decision_is_explained_by_figures():
    controller = DraftingController()
    drafted_for(controller, MIN_OBSERVATIONS, BAD)
    reason = controller.decide(may_be_trial=True).reason
    assert "-20%" in reason and "0% acceptance" in reason and f"{INITIAL_PAUSE - 1} requests" in reason


def test_drafts_that_began_before_the_pause_are_not_trials():
    """With eight concurrent requests, the drafts in flight must not lengthen the first pause."""
    controller = DraftingController()
    in_flight = [controller.decide(may_be_trial=True) for _ in range(8)]
    for decision in in_flight:
        controller.record(BAD, is_trial=decision.is_trial)
    decisions = [controller.decide(may_be_trial=True) for _ in range(INITIAL_PAUSE + 1)]
    assert [decision.is_trial for decision in decisions] == [False] * INITIAL_PAUSE + [True]


def test_there_is_one_trial_at_a_time_and_another_one_if_it_never_reports():
    controller = DraftingController()
    drafted_for(controller, MIN_OBSERVATIONS + INITIAL_PAUSE, BAD)
    decisions = [controller.decide(may_be_trial=True) for _ in range(2 * (INITIAL_PAUSE + 1))]
    assert [k for k, decision in enumerate(decisions) if decision.is_trial] == [0, INITIAL_PAUSE + 1]


def test_requests_that_cannot_be_trials_neither_draft_nor_count_during_a_pause():
    controller = DraftingController()
    drafted_for(controller, MIN_OBSERVATIONS, BAD)
    before = vars(controller).copy()
    assert not any(controller.decide(may_be_trial=False).draft for _ in range(10 * INITIAL_PAUSE))
    assert vars(controller) == before


def test_measured_answers_of_the_target_alone_replace_the_estimate_from_its_pace():
    """The pace of continuations leaves out the prompt. Here the prompt takes most of the time of the target alone."""
    controller = DraftingController()
    drafted = DraftingOutcome(draft_tokens=100, accepted_tokens=90, target_tokens=10, total_s=0.5, target_s=0.03)
    alone = DraftingOutcome(draft_tokens=0, accepted_tokens=0, target_tokens=100, total_s=1.0, target_s=1.0)
    decisions = []
    for _ in range(200):
        decision = controller.decide(may_be_trial=True)
        decisions.append(decision.draft)
        controller.record(drafted if decision.draft else alone, is_trial=decision.is_trial)
    assert decisions == [True] * MIN_OBSERVATIONS + [False] * INITIAL_PAUSE + [True] * (200 - MIN_OBSERVATIONS - 8)
    assert controller.gain == pytest.approx(0.5)


def answers(controller, count, drafted, alone):
    """Answers requests, and returns for each whether it was drafted."""
    decisions = []
    for _ in range(count):
        decision = controller.decide(may_be_trial=True)
        decisions.append(decision.draft)
        controller.record(drafted if decision.draft else alone, is_trial=decision.is_trial)
    return decisions


def test_answers_that_the_draft_model_words_more_briefly_count_by_answer_and_not_by_token():
    controller = DraftingController()
    slow = DraftingOutcome(draft_tokens=50, accepted_tokens=25, target_tokens=25, total_s=2.0, target_s=0.25)
    fast = DraftingOutcome(draft_tokens=50, accepted_tokens=50, target_tokens=0, total_s=0.7, target_s=0.0)
    answers(controller, MIN_OBSERVATIONS + INITIAL_PAUSE, slow, ALONE)
    assert answers(controller, 20, fast, ALONE) == [True] * 20
    assert controller.gain == pytest.approx(0.3)


def test_one_short_answer_does_not_pause_drafting():
    controller = DraftingController()
    short = DraftingOutcome(draft_tokens=1, accepted_tokens=1, target_tokens=0, total_s=0.2, target_s=0.0)
    assert answers(controller, 50, GOOD, ALONE) == [True] * 50
    controller.record(short)
    assert answers(controller, 50, GOOD, ALONE) == [True] * 50


def test_drafting_ends_when_answers_become_such_that_it_does_not_pay():
    """The measured time of the target alone is from before the change."""
    controller = DraftingController()
    drafted_for(controller, MIN_OBSERVATIONS, BAD)
    long_alone = DraftingOutcome(draft_tokens=0, accepted_tokens=0, target_tokens=1000, total_s=10.0, target_s=10.0)
    long_drafted = DraftingOutcome(draft_tokens=1000, accepted_tokens=900, target_tokens=100, total_s=3.0, target_s=1.0)
    assert all(answers(controller, INITIAL_PAUSE + 50, long_drafted, long_alone)[INITIAL_PAUSE:])
    assert sum(answers(controller, 1000, BAD, ALONE)) < MAX_PAUSE + 10


def record(controller, *outcomes):
    for outcome in outcomes:
        controller.record(outcome)


def test_the_measured_time_of_the_target_alone_counts_from_three_answers_on():
    controller = DraftingController()
    slow_alone = replace(ALONE, total_s=4.0)  # its pace with drafts is 10 ms per token, so the estimate is 1 s
    record(controller, *[GOOD] * MIN_OBSERVATIONS, slow_alone, slow_alone, GOOD)
    assert controller.gain == pytest.approx(1 - 0.3 / 1)
    record(controller, slow_alone, GOOD)
    assert controller.gain == pytest.approx(1 - 0.3 / 4)


def test_the_measured_time_of_the_target_alone_expires():
    controller = DraftingController()
    slow_alone = replace(ALONE, total_s=4.0)
    record(controller, *[GOOD] * MIN_OBSERVATIONS, *[slow_alone] * MIN_OBSERVATIONS, *[GOOD] * MAX_PAUSE)
    assert controller.gain == pytest.approx(1 - 0.3 / 4)
    record(controller, GOOD)
    assert controller.gain == pytest.approx(1 - 0.3 / 1)
    record(controller, slow_alone, slow_alone, GOOD)  # it counts again from three answers on
    assert controller.gain == pytest.approx(1 - 0.3 / 1)


def test_drafting_that_neither_gains_nor_loses_goes_on():
    controller = DraftingController()
    neutral = DraftingOutcome(draft_tokens=8, accepted_tokens=4, target_tokens=4, total_s=2.0, target_s=1.0)
    assert drafted_for(controller, 20, neutral) == 20
    assert controller.gain == 0
