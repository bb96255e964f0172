"""Selects the most likely ones of several choices, for the field `best_of`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deployments.observability.choice_state import ChoiceState


@dataclass(frozen=True)
class BestOf:
    """Keeps the `num_returned` most likely ones of the `num_generated` choices for each prompt."""

    num_generated: int
    num_returned: int
    with_logprobs: bool
    """Whether the client requested the log-probabilities, which are always generated to compare the choices."""

    def select(self, choices: Sequence[ChoiceState]) -> list[ChoiceState]:
        """Returns the choices that a response contains, the most likely ones of each prompt first."""
        selected: list[ChoiceState] = []
        for start in range(0, len(choices), self.num_generated):
            group = sorted(choices[start : start + self.num_generated], key=_mean_logprob, reverse=True)
            selected += group[: self.num_returned]
        return [self._renumbered(choice, index) for index, choice in enumerate(selected)]

    def _renumbered(self, choice: ChoiceState, index: int) -> ChoiceState:
        deltas = choice.deltas if self.with_logprobs else [replace(delta, logprobs=()) for delta in choice.deltas]
        return replace(choice, index=index, deltas=deltas)


def _mean_logprob(choice: ChoiceState) -> float:
    """Returns the mean log-probability of the tokens, so that long choices have no disadvantage."""
    logprobs = [logprob.logprob for delta in choice.deltas for logprob in delta.logprobs]
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
