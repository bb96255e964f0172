"""Where a draft is cut for judging. A cut c stands for its first c tokens."""

DEFAULT_STRIDE = 8


def cuts_every(stride: int, length: int, *, ended: bool) -> list[int]:
    """Every `stride` tokens; at the very end only if the draft ended by itself, where it asks about the full answer."""
    if stride < 1:
        raise ValueError(f"the stride between cuts must be at least 1, got {stride}")
    cuts = list(range(stride, length, stride))
    return [*cuts, length] if ended and length else cuts
