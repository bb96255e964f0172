"""Acceptance: decides how much of a draft is kept.

It also decides which prefixes must be evaluated for that.

Engines call `next_batch` to learn which prefixes to evaluate next and `accepted_prefix_length` to learn where to
continue. The pipeline calls the latter again on the result that it receives. The rules are entries of
`parse.registry.RULES`. Use `parse.registry.register_rule` to add your own.

The exact acceptance of single tokens, in mode `exact` and by speculative methods, is part of the program `generate` in
`parse/engines/native/generation.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parse.errors import RequestError, VerificationError
from parse.registry import get_rule, resolve

STRIDES = 8, 16, 32, 64
TYPICAL_DRAFT_TOKENS = 256
SEARCH_BATCH_SIZES = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32
"""The sizes of batches that a search tries, besides all prefixes at once."""


@dataclass(frozen=True)
class Thresholds:
    """The minimum P(correct) of a complete draft, and of a prefix.

    If a wrong prefix passes, a longer one usually fails, so only a little wrong text is kept. Nothing follows the
    complete answer that could still fail, so its threshold is higher.
    """

    full: float = 0.97
    prefix: float = 0.93

    def __post_init__(self) -> None:
        for name in ("full", "prefix"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise RequestError(f"thresholds.{name}", f"must be a number in 0..1, got {value!r}")


@dataclass(frozen=True)
class AcceptancePolicy:
    """Thresholds, and the name of the rule that applies them.

    A policy is sent between processes with its requests.
    """

    thresholds: Thresholds = Thresholds()
    rule: str = "first_failure"
    min_answer_mass: float = 0.0
    """A prefix fails if the two answer words together are less probable than this after the prefix."""
    exhaustive: bool = True
    """Whether all prefixes up to the first failure are evaluated, even where a search would be faster."""

    def __post_init__(self) -> None:
        get_rule(self.rule)


def passes(p_correct: float | None, threshold: float) -> bool:
    """Returns whether a prefix passes. A prefix that was not evaluated (None) fails."""
    return p_correct is not None and p_correct >= threshold


def first_failure(p_correct: Sequence[float | None], threshold: float) -> int:
    """Keeps the prefixes before the first one that fails."""
    failures = (index for index, value in enumerate(p_correct) if not passes(value, threshold))
    return next(failures, len(p_correct))


def last_passing(p_correct: Sequence[float | None], threshold: float) -> int:
    """Keeps the longest prefix that passes, even if shorter ones fail.

    It keeps more than `first_failure`, but each further prefix is one more opportunity for a false positive to extend
    the accepted prefix.
    """
    return max((index + 1 for index, value in enumerate(p_correct) if passes(value, threshold)), default=0)


def accepted_prefix_length(
    prefix_lengths: Sequence[int],
    p_correct: Sequence[float | None],
    policy: AcceptancePolicy,
    *,
    complete: bool,
) -> int:
    """Returns the number of draft tokens to keep.

    `prefix_lengths` are in ascending order. If the draft is `complete`, the last one is the complete answer. It is kept
    if it passes its own, higher threshold; otherwise it does not count as a prefix. The rule of the policy chooses
    among the prefixes.
    """
    if complete and prefix_lengths and passes(p_correct[-1], policy.thresholds.full):
        return prefix_lengths[-1]
    num_prefixes = max(0, len(prefix_lengths) - complete)
    if not num_prefixes:
        return 0
    num_kept = resolve(get_rule(policy.rule).function)(p_correct[:num_prefixes], policy.thresholds.prefix)
    if not hasattr(num_kept, "__index__") or not 0 <= num_kept <= num_prefixes:
        raise VerificationError(f"the rule {policy.rule} kept {num_kept} of {num_prefixes} prefixes")
    return prefix_lengths[num_kept - 1] if num_kept else 0


def next_batch(
    num_prefixes: int,
    p_correct: Mapping[int, float | None],
    policy: AcceptancePolicy | None,
    *,
    complete: bool,
    max_batch: int,
    answer_first: bool,
    batch_seconds: Callable[[int], float] | None = None,
) -> list[int]:
    """Returns the indices of the prefixes to evaluate next, at most `max_batch`.

    Returns [] once the result is decided. `p_correct` holds the results so far, by index. A complete answer that passes
    decides everything, so it is always in the first batch. With `answer_first` it is the only one there. If it passes,
    no prefix needs to be evaluated. This avoids evaluating the other prefixes on devices where the number of tokens
    dominates the cost of a pass. Without a policy, every prefix is evaluated.

    `batch_seconds` returns how long a batch takes, by its size. If it is known, and neither the policy nor its rule
    requires all prefixes, the first failure is searched from coarse to fine: a batch contains prefixes at equal
    distances, and the next one those between the last that passed and the first that failed. `answer_first` does not
    change which prefixes these are.
    """
    last = num_prefixes - 1
    has_answer = policy is not None and complete and num_prefixes > 0
    if policy is not None and has_answer and passes(p_correct.get(last), policy.thresholds.full):
        return []
    evaluates_answer = has_answer and last not in p_correct
    if evaluates_answer and answer_first:
        return [last]
    prefixes = range(num_prefixes - has_answer)
    remaining = [index for index in prefixes if index not in p_correct]
    if policy is None or not get_rule(policy.rule).stops_at_failure:
        batch = remaining
    elif batch_seconds is None or policy.exhaustive:
        batch = remaining if len(prefixes) == _first_failure(prefixes, p_correct, policy) else []
    else:
        batch = _search_batch(prefixes, p_correct, policy, max(1, max_batch - has_answer), batch_seconds)
    return [*batch[: max_batch - 1], last] if evaluates_answer else batch[:max_batch]


def _first_failure(prefixes: range, p_correct: Mapping[int, float | None], policy: AcceptancePolicy) -> int:
    """Returns the index of the first evaluated prefix that fails, or the number of prefixes."""
    evaluated = (index for index in prefixes if index in p_correct)
    failures = (index for index in evaluated if not passes(p_correct[index], policy.thresholds.prefix))
    return next(failures, len(prefixes))


def _search_batch(
    prefixes: range,
    p_correct: Mapping[int, float | None],
    policy: AcceptancePolicy,
    max_batch: int,
    batch_seconds: Callable[[int], float],
) -> list[int]:
    """Returns prefixes at equal distances between the last that passed and the first that failed."""
    first_failure = _first_failure(prefixes, p_correct, policy)
    last_pass = max((index for index in prefixes[:first_failure] if index in p_correct), default=-1)
    num_between = first_failure - last_pass - 1
    count = search_batch_size(num_between, max_batch, batch_seconds)
    # The distance to the last one is the same as between them.
    return [last_pass + (num_between + 1) * (number + 1) // (count + 1) for number in range(count)]


def cheapest_stride(batch_seconds: Callable[[int], float], step_seconds: float) -> int:
    """Returns the distance between prefixes with which a rejected draft of typical length costs the least time.

    A larger distance needs fewer prefixes, and on average half of it is accepted less, which the target then generates
    in steps of one token.
    """

    def seconds(stride: int) -> float:
        search_seconds, _ = _search(TYPICAL_DRAFT_TOKENS // stride, TYPICAL_DRAFT_TOKENS, batch_seconds, {})
        return search_seconds + stride / 2 * step_seconds

    return min(STRIDES, key=seconds)


def search_batch_size(num_prefixes: int, max_batch: int, batch_seconds: Callable[[int], float]) -> int:
    """Returns how many of the prefixes to evaluate first, so that the search for the first failure takes least time.

    The search continues with the prefixes between two neighbors, of which there are at most as many as this many divide
    the others into. Evaluating all prefixes at once is one of the choices.
    """
    return _search(num_prefixes, max_batch, batch_seconds, {})[1]


def _search(
    num_prefixes: int, max_batch: int, batch_seconds: Callable[[int], float], results: dict[int, tuple[float, int]]
) -> tuple[float, int]:
    """Returns the time of the search and the size of its first batch."""
    if not num_prefixes:
        return 0.0, 0
    if num_prefixes not in results:
        choices = {
            size for size in (*SEARCH_BATCH_SIZES, num_prefixes, max_batch) if size <= min(num_prefixes, max_batch)
        }
        results[num_prefixes] = min(
            (batch_seconds(size) + _search(num_prefixes // (size + 1), max_batch, batch_seconds, results)[0], size)
            for size in choices
        )
    return results[num_prefixes]
