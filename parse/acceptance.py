"""The acceptance rule: how much of a draft is kept, and which prefixes must be evaluated to decide that.

To change the rule, edit this file only. Engines call `next_batch` to learn which prefixes to evaluate next and
`accepted_prefix_length` to learn where to continue; the pipeline calls the latter again to check their result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from parse.errors import RequestError

AcceptanceRule = Literal["first_failure", "longest_passing"]


@dataclass(frozen=True)
class Thresholds:
    """The minimum P(correct) at which a complete draft is accepted, and at which a prefix passes.

    With the defaults the demo pair accepts 98% of the correct drafts in full and 1% of the wrong ones. An error in a
    prefix is caught by longer prefixes. Nothing catches an error in the complete answer, so its threshold is higher.
    """

    full: float = 0.97
    prefix: float = 0.93

    def __post_init__(self) -> None:
        for name in ("full", "prefix"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise RequestError(f"thresholds.{name}", f"must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True)
class AcceptancePolicy:
    """Thresholds and the rule that applies them.

    `first_failure` keeps the last prefix before the first one that fails. `longest_passing` keeps the longest prefix
    that passes. It keeps more, but each further prefix adds a chance that a single false positive is trusted.
    """

    thresholds: Thresholds = Thresholds()
    rule: AcceptanceRule = "first_failure"


def accepted_prefix_length(
    prefix_lengths: Sequence[int],
    p_correct: Sequence[float | None],
    policy: AcceptancePolicy,
    *,
    complete: bool,
) -> int:
    """Returns the number of draft tokens to keep.

    `prefix_lengths` are in ascending order. If the draft is `complete`, the last one is the complete answer. It is kept
    if it passes its own, higher threshold; otherwise it does not count as a prefix. A prefix that was not evaluated
    (None) does not pass.
    """
    if complete and prefix_lengths and _passes(p_correct[-1], policy.thresholds.full):
        return prefix_lengths[-1]
    accepted = 0
    for length, probability in zip(prefix_lengths[: len(prefix_lengths) - complete], p_correct, strict=False):
        if _passes(probability, policy.thresholds.prefix):
            accepted = length
        elif policy.rule == "first_failure":
            break
    return accepted


def next_batch(
    num_prefixes: int,
    p_correct: Mapping[int, float],
    policy: AcceptancePolicy | None,
    *,
    complete: bool,
    max_batch: int,
    answer_first: bool,
) -> list[int]:
    """Returns the indices of the prefixes to evaluate next, at most `max_batch`, or [] once the result is decided.

    `p_correct` holds the results so far, by index. A complete answer that passes decides everything, so it is always in
    the first batch. With `answer_first` it is the only one there. This saves evaluating prefixes on devices where a
    further forward pass costs little more than its tokens. Without a policy, every prefix is evaluated.
    """
    last = num_prefixes - 1
    if policy is not None and complete and num_prefixes:
        if last in p_correct and _passes(p_correct[last], policy.thresholds.full):
            return []
        if last not in p_correct:
            others = [index for index in range(last) if index not in p_correct]
            return [*([] if answer_first else others[: max_batch - 1]), last]
    if policy is not None and policy.rule == "first_failure":
        prefixes = range(num_prefixes - complete)
        if any(index in p_correct and not _passes(p_correct[index], policy.thresholds.prefix) for index in prefixes):
            return []
    return [index for index in range(num_prefixes) if index not in p_correct][:max_batch]


def _passes(probability: float | None, threshold: float) -> bool:
    return probability is not None and probability >= threshold
