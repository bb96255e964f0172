"""P(correct) from the log-probabilities that a server returns, and what it costs to ask for them."""

import math
from collections.abc import Iterable, Mapping

from parse.prompts import VerificationSuffix
from parse.types import VerifyResult

SMOOTHING = 0.1  # the weight of a new measurement
TRIAL_INTERVAL = 50  # verifications until the way that seems slower is measured again


def answer_probabilities(
    logprobs: Mapping[int, float], suffix: VerificationSuffix, *, all_returned: bool
) -> tuple[float, float]:
    """Returns P(correct) and the probability of both answers together.

    If the server returns only the most likely tokens, a missing token of the answer "incorrect" counts as likely as the
    least likely one of them, so that P(correct) is never too high.
    """
    floor = -math.inf if all_returned else min(logprobs.values(), default=-math.inf)
    correct = _sum(logprobs.get(token, -math.inf) for token in set(suffix.correct_token_ids))
    incorrect = _sum(logprobs.get(token, -math.inf) for token in set(suffix.incorrect_token_ids))
    incorrect_bound = _sum(logprobs.get(token, floor) for token in set(suffix.incorrect_token_ids))
    if not correct:
        return 0.0, incorrect
    return correct / (correct + incorrect_bound), min(1.0, correct + incorrect)


def _sum(logprobs: Iterable[float]) -> float:
    return math.fsum(map(math.exp, logprobs))


def result_of(
    num_prefixes: int, p_correct: Mapping[int, float | None], answer_mass: Mapping[int, float]
) -> VerifyResult:
    indices = range(num_prefixes)
    return VerifyResult(
        tuple(p_correct.get(index) for index in indices), answer_mass=tuple(answer_mass.get(index) for index in indices)
    )


class VerificationCost:
    """Decides whether a complete answer is evaluated alone first, or together with its prefixes.

    Alone, it costs less if the answer passes, and one more call if it fails. The decision changes no result.
    """

    def __init__(self) -> None:
        self._answer_s: float | None = None
        self._prefixes_s: float | None = None
        self._pass_rate = 0.5
        self._num_decisions = 0

    def answer_first(self) -> bool:
        self._num_decisions += 1
        if self._answer_s is None or self._prefixes_s is None:
            return True  # if the answer fails, both are measured
        expected_saving = self._pass_rate * self._prefixes_s - self._answer_s
        return (expected_saving > 0) != (self._num_decisions % TRIAL_INTERVAL == 0)

    def record_call(self, num_prefixes: int, seconds: float) -> None:
        if num_prefixes == 1:
            self._answer_s = _smooth(self._answer_s, seconds)
        else:
            self._prefixes_s = _smooth(self._prefixes_s, seconds)

    def record_answer(self, passed: bool) -> None:
        self._pass_rate = _smooth(self._pass_rate, float(passed))


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - SMOOTHING) * mean + SMOOTHING * value
