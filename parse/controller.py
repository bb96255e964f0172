"""Whether to draft at all: measured, explained by figures, and taken back when the figures change.

What a draft saves is the target's time for the tokens it kept; what it costs is the time before the target could
write. Both are weighed as shares of what the target alone would have taken. When drafting has lost for a while it
pauses, and one request in ever longer intervals tries it again.
"""

from dataclasses import dataclass

EMA_WEIGHT = 0.2  # of the newest request in the running means
MIN_OBSERVATIONS = 3  # drafts before the figures count
MIN_GAIN_TO_RESUME = 0.1  # more than the 0 that stops it: no flutter around the border
INITIAL_PAUSE, MAX_PAUSE = 8, 256  # requests answered without a draft before the next trial


@dataclass(frozen=True)
class DraftingOutcome:
    """Of one answer that was drafted for."""

    draft_tokens: int
    accepted_tokens: int
    target_tokens: int  # tokens by the target
    total_s: float
    target_s: float  # of it, the target writing


@dataclass(frozen=True)
class DraftingDecision:
    draft: bool
    reason: str


class DraftingController:
    """Of one deployment. Not thread-safe: it belongs to one event loop."""

    def __init__(self) -> None:
        self.gain: float | None = None  # mean of (time alone - time taken) / time alone
        self.acceptance: float | None = None  # mean share of the drafted tokens
        self.token_s: float | None = None  # the target's time for a token
        self.overhead_s: float | None = None  # mean time to draft and judge, per drafted token
        self._num_drafts = 0
        self._paused = False
        self._pause = INITIAL_PAUSE
        self._requests_until_trial = 0

    def decide(self) -> DraftingDecision:
        """Asked once for every request that leaves the choice to us."""
        if not self._paused:
            return DraftingDecision(True, "drafting pays" if self._num_drafts else "nothing is known yet")
        if self._requests_until_trial > 0:
            self._requests_until_trial -= 1
            return DraftingDecision(
                False, f"drafting does not pay: {self.summary()}; tried again in {self._requests_until_trial} requests"
            )
        return DraftingDecision(True, f"a trial: {self.summary()}")

    def record(self, outcome: DraftingOutcome) -> None:
        if outcome.target_tokens:
            self.token_s = _running_mean(self.token_s, outcome.target_s / outcome.target_tokens)
        if not outcome.draft_tokens:
            return
        self._num_drafts += 1
        if self._num_drafts == 1:  # its time holds much that is done only once
            return
        self.acceptance = _running_mean(self.acceptance, outcome.accepted_tokens / outcome.draft_tokens)
        spent_s = outcome.total_s - outcome.target_s
        self.overhead_s = _running_mean(self.overhead_s, spent_s / outcome.draft_tokens)
        if self.token_s is None:  # every draft was accepted whole: the target has yet to write a token
            return
        target_alone_s = self.token_s * (outcome.accepted_tokens + outcome.target_tokens)
        gain = (self.token_s * outcome.accepted_tokens - spent_s) / target_alone_s if target_alone_s else -1.0
        if self._paused:
            self._evaluate_trial(gain)
            return
        self.gain = _running_mean(self.gain, gain)
        if self._num_drafts >= MIN_OBSERVATIONS and self.gain < 0:
            self._paused, self._requests_until_trial, self._pause = True, INITIAL_PAUSE, INITIAL_PAUSE

    def another_round_pays(self, remaining_tokens: int) -> bool:
        """Is a further draft of about that many tokens expected to save more than it takes?"""
        if remaining_tokens <= 0:
            return False
        if self.token_s is None or self.acceptance is None or self.overhead_s is None:
            return True
        return self.acceptance * self.token_s > self.overhead_s

    def summary(self) -> str:
        if self.gain is None or self.acceptance is None:
            return "no draft has been weighed yet"
        return f"a gain of {self.gain:.0%} at {self.acceptance:.0%} acceptance"

    def _evaluate_trial(self, gain: float) -> None:
        if gain > MIN_GAIN_TO_RESUME:
            self._paused, self.gain = False, gain
        else:
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._requests_until_trial = self._pause


def _running_mean(before: float | None, new: float) -> float:
    return new if before is None else before + EMA_WEIGHT * (new - before)
