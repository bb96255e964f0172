"""Chooses the prefix lengths at which a draft is verified.

A length n stands for the first n tokens of the draft.
"""

from collections.abc import Sequence
from typing import Literal, get_args

DEFAULT_STRIDE = 8

SENTENCE_ENDS = ".", "!", "?", "…"
PrefixBoundary = Literal["tokens", "sentences", "lines"]


def prefix_lengths_every(stride: int, length: int, *, complete: bool) -> list[int]:
    """Returns the multiples of `stride` that are shorter than the draft.

    If the draft is a complete answer, its own length is added.
    """
    if stride < 1:
        raise ValueError(f"the stride between prefix lengths must be at least 1, got {stride}")
    lengths = list(range(stride, length, stride))
    return [*lengths, length] if complete and length else lengths


def prefix_lengths_at(
    boundaries: Sequence[PrefixBoundary], token_texts: Sequence[str], *, stride: int, complete: bool
) -> list[int]:
    """Returns the lengths at the named boundaries.

    `token_texts` holds the text of each token of the draft.
    """
    if not boundaries or not set(boundaries) <= set(get_args(PrefixBoundary)):
        choices = ", ".join(get_args(PrefixBoundary))
        raise ValueError(f"prefix_boundaries must be some of {choices}, got {list(boundaries)}")
    lengths = []
    for length in range(1, len(token_texts)):
        before, after = token_texts[length - 1], token_texts[length]
        ends_line = "\n" in before
        ends_sentence = before.rstrip().endswith(SENTENCE_ENDS) and (before[-1:].isspace() or after[:1].isspace())
        if ("lines" in boundaries and ends_line) or ("sentences" in boundaries and ends_sentence):
            lengths.append(length)
    stride = stride if "tokens" in boundaries else len(token_texts) + 1
    return sorted({*lengths, *prefix_lengths_every(stride, len(token_texts), complete=complete)})
