"""Where a draft is cut for judging. A cut c stands for its first c tokens."""

from collections.abc import Sequence
from typing import Literal, get_args

DEFAULT_STRIDE = 8

STOPS = ".", "!", "?", "…"
Places = Literal["tokens", "sentences", "lines"]


def cuts_every(stride: int, length: int, *, ended: bool) -> list[int]:
    """Every `stride` tokens; at the very end only if the draft ended by itself, where it asks about the full answer."""
    if stride < 1:
        raise ValueError(f"the stride between cuts must be at least 1, got {stride}")
    cuts = list(range(stride, length, stride))
    return [*cuts, length] if ended and length else cuts


def cuts_at(places: Sequence[Places], pieces: Sequence[str], *, stride: int, ended: bool) -> list[int]:
    """Cuts at all the places named; `pieces` is the text of each of the draft's tokens."""
    if not places or not set(places) <= set(get_args(Places)):
        raise ValueError(f"places must be some of {', '.join(get_args(Places))}, got {list(places)}")
    ends = []
    for cut in range(1, len(pieces)):
        before, after = pieces[cut - 1], pieces[cut]
        line = "\n" in before
        sentence = before.rstrip().endswith(STOPS) and (before[-1:].isspace() or after[:1].isspace())
        if ("lines" in places and line) or ("sentences" in places and sentence):
            ends.append(cut)
    every = cuts_every(stride if "tokens" in places else len(pieces) + 1, len(pieces), ended=ended)
    return sorted({*ends, *every})
