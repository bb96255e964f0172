"""Statistics of past proposals.

They say how many tokens were accepted, at which positions, and how long to pause.
"""

from dataclasses import dataclass, field, replace

INITIAL_PAUSE, MAX_PAUSE = 4, 64  # steps without proposals before the next trial
CALIBRATION_PRIOR = 2.0  # tokens; the weight of the assumption that the calibration is 1
CALIBRATION_HORIZON = 10.0  # proposals after which an observation has lost most of its weight
POSITION_PRIOR = 3  # proposals; the weight of the assumption that a new position is as good as the one before it


@dataclass
class AcceptanceRecord:
    """Running means over the proposals of one sequence, or of all sequences."""

    mean_accepted: float = 0.0  # accepted tokens per proposal
    mean_cost_s: float = 0.0  # seconds that the tokens of a proposal added to a step
    acceptance_rates: list[float] = field(default_factory=list)
    """The acceptance rate at each position, over the proposals that reached it."""
    num_observed: list[int] = field(default_factory=list)
    """The number of proposals that reached each position, including the prior."""

    def add(self, accepted: int, depth: int, cost_s: float, weight: float, position_weight: float) -> None:
        """Adds a proposal of `depth` positions whose first `accepted` were accepted.

        The proposal has the weight `weight` in the means, and at least `position_weight` at each position. At positions
        that few proposals have reached, it has more weight.
        """
        self.mean_accepted += weight * (accepted - self.mean_accepted)
        self.mean_cost_s += weight * (cost_s - self.mean_cost_s)
        for position in range(depth):
            if position == len(self.acceptance_rates):
                self.acceptance_rates.append(self.acceptance_rates[-1] if position else 1.0)
                self.num_observed.append(POSITION_PRIOR)
            self.num_observed[position] += 1
            self.acceptance_rates[position] += max(position_weight, 1 / self.num_observed[position]) * (
                (position < accepted) - self.acceptance_rates[position]
            )

    def copy(self) -> "AcceptanceRecord":
        return replace(self, acceptance_rates=list(self.acceptance_rates), num_observed=list(self.num_observed))


@dataclass
class Calibration:
    """Compares the predicted acceptance of proposals with the observed one."""

    _predicted: float = CALIBRATION_PRIOR  # accepted tokens, with exponentially decaying weights
    _observed: float = CALIBRATION_PRIOR

    def add(self, predicted: float, observed: float) -> None:
        """Adds a proposal: the expected and the actual number of accepted tokens."""
        self._predicted += predicted - (self._predicted - CALIBRATION_PRIOR) / CALIBRATION_HORIZON
        self._observed += observed - (self._observed - CALIBRATION_PRIOR) / CALIBRATION_HORIZON

    @property
    def ratio(self) -> float:
        """The observed acceptance divided by the predicted one, within bounds.

        The bounds prevent one bad estimate from stopping all proposals.
        """
        return min(1.5, max(0.05, self._observed / self._predicted))


@dataclass
class Backoff:
    """Pauses proposals for some steps.

    The pause doubles each time a trial does not pay. A pause ends at a step whose number is a multiple of the length of
    the pause. Sequences that could share the time of proposing therefore try again in the same step. If one sequence
    tried alone, it would bear the whole time of proposing, and its trial would not show whether proposing pays for all
    of them together.
    """

    length: int = INITIAL_PAUSE
    end: int = 0

    def begin(self, step: int) -> None:
        """Begins a pause at this step and doubles the length of the next one."""
        self.end = (step // self.length + 1) * self.length
        self.length = min(2 * self.length, MAX_PAUSE)

    def update(self, pays: bool, step: int) -> None:
        """Begins a pause if proposals do not pay.

        Otherwise the next pause is short again.
        """
        if pays:
            self.length = INITIAL_PAUSE
        else:
            self.begin(step)
