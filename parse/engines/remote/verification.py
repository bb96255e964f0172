"""P(correct) from the log-probabilities that a server returns, and what it costs to ask for them."""

import math
from collections.abc import Iterable, Mapping

from parse.prompts import VerificationSuffix
from parse.types import VerifyResult

SMOOTHING = 0.1  # the weight of a new result in the share of answers that pass
SEARCH_CALL_COST = 4.0


def search_cost(num_prompts: int) -> float:
    """Returns the cost of a call in the search for the first prefix that fails, in prompts.

    It is not measured, because the choice of the prefixes can change which one is accepted, and all replicas have to
    accept the same one.
    """
    return SEARCH_CALL_COST + num_prompts


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


class AnswerFirstPolicy:
    """Decides whether a complete answer is evaluated alone first, or together with the first batch of its prefixes.

    Alone, it saves these prefixes if the answer passes, and costs one more call if it fails. The decision changes no
    result.
    """

    def __init__(self, call_cost: float) -> None:
        """`call_cost` is the cost of a call apart from its prompts, in prompts."""
        self._call_cost = call_cost
        self._pass_rate = 0.5

    def decide(self, num_prefixes: int) -> bool:
        """`num_prefixes` is the size of the first batch without the answer."""
        return self._pass_rate * num_prefixes > (1 - self._pass_rate) * self._call_cost

    def record(self, passed: bool) -> None:
        self._pass_rate += SMOOTHING * (passed - self._pass_rate)
