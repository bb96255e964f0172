"""Statistics of past proposals.

They say how many tokens were accepted, at which positions, and how long to pause.
"""

from dataclasses import dataclass, field, replace

INITIAL_PAUSE, MAX_PAUSE = 4, 64  # steps without proposals before the next trial
CALIBRATION_PRIOR = 2.0  # tokens: how strongly the calibration is assumed to be 1 at first
CALIBRATION_HORIZON = 10.0  # proposals, over which the calibration forgets
POSITION_PRIOR = 3  # proposals: how strongly a new position is assumed to be as good as the one before it


@dataclass
class AcceptanceRecord:
    """Running means over proposals: of one sequence, or of all sequences of a method."""

    mean_accepted: float = 0.0  # accepted tokens of a proposal
    mean_cost_s: float = 0.0  # seconds that its tokens added to a step
    acceptance_rates: list[float] = field(default_factory=list)
    """For each position: the share of tokens accepted there, of the proposals that reached that far."""
    num_observed: list[int] = field(default_factory=list)
    """For each position: how many proposals reached that far, with the prior counted as proposals too."""

    def add(self, accepted: int, depth: int, cost_s: float, weight: float, position_weight: float) -> None:
        """Adds a proposal of `depth` positions whose first `accepted` were accepted.

        The new value has the given weight in the means. A position that few proposals have reached gives it more.
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
    """Steps without proposals, more of them each time that a trial does not pay.

    A pause ends at a multiple of its length. Sequences that could share the time of proposing therefore try in the same
    step: alone, none of them could find out that it pays for all of them together.
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
