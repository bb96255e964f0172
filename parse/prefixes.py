"""Where a draft is cut for judging. A cut c stands for its first c tokens."""

from collections.abc import Sequence
from typing import Literal, get_args

DEFAULT_STRIDE = 8

SENTENCE_ENDS = ".", "!", "?", "…"
PrefixBoundary = Literal["tokens", "sentences", "lines"]


def prefix_lengths_every(stride: int, length: int, *, ended: bool) -> list[int]:
    """Every `stride` tokens; at the very end only if the draft ended by itself, where it asks about the full answer."""
    if stride < 1:
        raise ValueError(f"the stride between cuts must be at least 1, got {stride}")
    lengths = list(range(stride, length, stride))
    return [*lengths, length] if ended and length else lengths


def prefix_lengths_at(
    boundaries: Sequence[PrefixBoundary], token_texts: Sequence[str], *, stride: int, ended: bool
) -> list[int]:
    """Cuts at all the places named; `pieces` is the text of each of the draft's tokens."""
    if not boundaries or not set(boundaries) <= set(get_args(PrefixBoundary)):
        raise ValueError(f"places must be some of {', '.join(get_args(PrefixBoundary))}, got {list(boundaries)}")
    lengths = []
    for length in range(1, len(token_texts)):
        before, after = token_texts[length - 1], token_texts[length]
        ends_line = "\n" in before
        ends_sentence = before.rstrip().endswith(SENTENCE_ENDS) and (before[-1:].isspace() or after[:1].isspace())
        if ("lines" in boundaries and ends_line) or ("sentences" in boundaries and ends_sentence):
            lengths.append(length)
    regular = prefix_lengths_every(
        stride if "tokens" in boundaries else len(token_texts) + 1, len(token_texts), ended=ended
    )
    return sorted({*lengths, *regular})
