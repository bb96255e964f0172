"""Mode `auto`: decides for each request whether to draft.

The decision follows from measured gains and is revised when these change.

The gain of a draft is the time that it saves, as a share of the time that the target alone would have taken for the
answer. Until three answers of the target alone have been measured, this time is estimated from the pace at which the
target continues drafts. The estimate leaves out the prompt, so it is too low, and drafting may be paused too early. The
answers during the pause then give a better estimate.

When drafting has cost more than it saved for a while, it is paused. From then on, only single requests draft, at
growing intervals. These requests are called trials. In `parse/pipeline.py`, `Pipeline._choose_mode` asks this
controller about requests in mode `auto` without a prediction, and `_informs_controller` says from which requests it
learns.
"""

from dataclasses import dataclass

# Weight of the newest request in the running means. Many drafts are accepted as a whole or hardly at all, so the gains
# of single answers differ widely.
EMA_WEIGHT = 0.1
MIN_OBSERVATIONS = 3  # drafts before the gain decides, and answers of the target alone before their time counts
# Drafting pauses below a gain of 0. The higher limit keeps it from switching on and off all the time.
MIN_GAIN_TO_RESUME = 0.1
# Requests answered without a draft before the next trial. After the larger number of drafts, the time of the target
# alone counts as out of date.
INITIAL_PAUSE, MAX_PAUSE = 8, 256


@dataclass(frozen=True)
class DraftingOutcome:
    """The token counts and times of one answer. Without a draft, `draft_tokens` is 0."""

    draft_tokens: int
    accepted_tokens: int
    target_tokens: int
    total_s: float
    target_s: float  # the part of `total_s` in which the target generated


@dataclass(frozen=True)
class DraftingDecision:
    draft: bool
    reason: str
    is_trial: bool = False


class DraftingController:
    """Decides for one pipeline whether mode `auto` drafts.

    It is not thread-safe and belongs to one event loop.
    """

    def __init__(self) -> None:
        self.gain: float | None = None  # mean of (time alone - time taken) / time alone
        self.acceptance: float | None = None  # mean accepted share of the draft tokens
        self.token_s: float | None = None  # mean seconds per token in which the target continues a draft
        self.drafted_s: float | None = None  # mean seconds of answers with a draft
        self.drafted_tokens: float | None = None  # mean tokens of answers with a draft
        self.target_alone_s: float | None = None  # mean seconds of answers without a draft
        self._num_target_alone = self._drafts_since_target_alone = 0
        self._num_drafts = 0
        self._paused = False
        # These have a value from the first pause on.
        self._pause: int
        self._requests_until_trial: int

    def decide(self, *, may_be_trial: bool) -> DraftingDecision:
        """Decides whether one request in mode `auto` gets a draft.

        While drafting is paused, a request counts towards the interval between two trials only if it may be a trial
        itself.
        """
        if not self._paused:
            return DraftingDecision(True, "drafting pays" if self._num_drafts else "no draft has been measured yet")
        if may_be_trial and self._requests_until_trial == 0:
            # Counts again from here, so that there is one trial at a time, and another one if this one never reports.
            self._requests_until_trial = self._pause
            return DraftingDecision(True, f"this is a trial: {self.summary()}", is_trial=True)
        self._requests_until_trial -= may_be_trial
        reason = f"drafting does not pay: {self.summary()}"
        if may_be_trial:
            reason += f"; the next trial follows after {self._requests_until_trial} requests"
        return DraftingDecision(False, reason)

    def record(self, outcome: DraftingOutcome, *, is_trial: bool = False) -> None:
        """Adds one answer to the means.

        Pauses drafting if it no longer pays, or resumes it after a successful trial.
        """
        if not outcome.draft_tokens:
            self.target_alone_s = _running_mean(self.target_alone_s, outcome.total_s)
            self._num_target_alone += 1
            self._drafts_since_target_alone = 0
            return
        if outcome.target_tokens:
            self.token_s = _running_mean(self.token_s, outcome.target_s / outcome.target_tokens)
        self._num_drafts += 1
        if self._num_drafts == 1:  # the first draft includes work that is done only once
            return
        self.acceptance = _running_mean(self.acceptance, outcome.accepted_tokens / outcome.draft_tokens)
        num_tokens = outcome.accepted_tokens + outcome.target_tokens
        if self._paused:
            if is_trial:  # other drafts began before the pause
                self._evaluate_trial(outcome.total_s, num_tokens)
            return
        self.drafted_s = _running_mean(self.drafted_s, outcome.total_s)
        self.drafted_tokens = _running_mean(self.drafted_tokens, num_tokens)
        self._drafts_since_target_alone += 1
        if self._drafts_since_target_alone > MAX_PAUSE:  # the answers or the load may have changed
            self.target_alone_s, self._num_target_alone = None, 0
        if (target_alone_s := self._estimate_target_alone_s(self.drafted_tokens)) is None:
            return
        self.gain = _gain(self.drafted_s, target_alone_s)
        if self._num_drafts >= MIN_OBSERVATIONS and self.gain < 0:
            self._paused, self._requests_until_trial, self._pause = True, INITIAL_PAUSE, INITIAL_PAUSE

    def summary(self) -> str:
        if self.gain is None or self.acceptance is None:
            return "no draft has been measured yet"
        return f"a gain of {self.gain:.0%} at {self.acceptance:.0%} acceptance"

    def _estimate_target_alone_s(self, num_tokens: float) -> float | None:
        """Estimates the time of the target alone.

        `num_tokens` is the length of an answer with a draft. Such answers have the wording of the draft model, so their
        mean length may differ from that of others. For a drafted answer of mean length, the estimate is the mean time
        of answers without a draft. Other lengths are scaled in proportion.
        """
        if self._num_target_alone >= MIN_OBSERVATIONS:
            assert self.target_alone_s is not None
            return self.target_alone_s * num_tokens / self.drafted_tokens if self.drafted_tokens else 0.0
        if self.token_s is None:  # every draft was accepted in full, so the target has not generated a token yet
            return None
        return self.token_s * num_tokens

    def _evaluate_trial(self, total_s: float, num_tokens: int) -> None:
        gain = _gain(total_s, self._estimate_target_alone_s(num_tokens) or 0.0)
        if gain > MIN_GAIN_TO_RESUME:
            self._paused, self.gain = False, gain
            # The mean before the pause is out of date.
            self.drafted_s = (1 - gain) * (self._estimate_target_alone_s(self.drafted_tokens or 0.0) or 0.0)
        else:
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._requests_until_trial = self._pause


def _gain(drafted_s: float, target_alone_s: float) -> float:
    return 1 - drafted_s / target_alone_s if target_alone_s else -1.0


def _running_mean(before: float | None, new: float) -> float:
    return new if before is None else before + EMA_WEIGHT * (new - before)
