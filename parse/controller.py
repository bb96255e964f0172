"""Whether to draft at all: measured, explained by figures, and taken back when the figures change.

What a draft saves is the target's time for the tokens it kept; what it costs is the time before the target could
write. Both are weighed as shares of what the target alone would have taken. When drafting has lost for a while it
pauses, and one request in ever longer intervals tries it again.
"""

from dataclasses import dataclass

WEIGHT = 0.2  # of the newest request in the running means
PATIENCE = 3  # drafts before the figures count
GAIN_TO_RESUME = 0.1  # more than the 0 that stops it: no flutter around the border
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # requests answered without a draft before the next trial


@dataclass(frozen=True)
class Outcome:
    """Of one answer that was drafted for."""

    drafted: int
    accepted: int
    written: int  # tokens by the target
    total_s: float
    write_s: float  # of it, the target writing


@dataclass(frozen=True)
class Decision:
    draft: bool
    reason: str


class Control:
    """Of one deployment. Not thread-safe: it belongs to one event loop."""

    def __init__(self) -> None:
        self.gain: float | None = None  # mean of (time alone - time taken) / time alone
        self.acceptance: float | None = None  # mean share of the drafted tokens
        self.token_s: float | None = None  # the target's time for a token
        self.overhead_s: float | None = None  # mean time to draft and judge, per drafted token
        self._seen = 0
        self._off = False
        self._pause = FIRST_PAUSE
        self._left = 0

    def decide(self) -> Decision:
        """Asked once for every request that leaves the choice to us."""
        if not self._off:
            return Decision(True, "drafting pays" if self._seen else "nothing is known yet")
        if self._left > 0:
            self._left -= 1
            return Decision(False, f"drafting does not pay: {self.explain()}; tried again in {self._left} requests")
        return Decision(True, f"a trial: {self.explain()}")

    def learn(self, outcome: Outcome) -> None:
        if outcome.written:
            self.token_s = _mean(self.token_s, outcome.write_s / outcome.written)
        if not outcome.drafted:
            return
        self._seen += 1
        if self._seen == 1:  # its time holds much that is done only once
            return
        self.acceptance = _mean(self.acceptance, outcome.accepted / outcome.drafted)
        spent = outcome.total_s - outcome.write_s
        self.overhead_s = _mean(self.overhead_s, spent / outcome.drafted)
        if self.token_s is None:  # every draft was accepted whole: the target has yet to write a token
            return
        alone = self.token_s * (outcome.accepted + outcome.written)
        gain = (self.token_s * outcome.accepted - spent) / alone if alone else -1.0
        if self._off:
            self._judge_trial(gain)
            return
        self.gain = _mean(self.gain, gain)
        if self._seen >= PATIENCE and self.gain < 0:
            self._off, self._left, self._pause = True, FIRST_PAUSE, FIRST_PAUSE

    def another_round_pays(self, missing: int) -> bool:
        """Is a further draft of about that many tokens expected to save more than it takes?"""
        if missing <= 0:
            return False
        if self.token_s is None or self.acceptance is None or self.overhead_s is None:
            return True
        return self.acceptance * self.token_s > self.overhead_s

    def explain(self) -> str:
        if self.gain is None or self.acceptance is None:
            return "no draft has been weighed yet"
        return f"a gain of {self.gain:.0%} at {self.acceptance:.0%} acceptance"

    def _judge_trial(self, gain: float) -> None:
        if gain > GAIN_TO_RESUME:
            self._off, self.gain = False, gain
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._left = self._pause


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + WEIGHT * (new - before)
