"""Which problems of a data set are used if their number is limited."""

from collections.abc import Iterable, Sequence
from itertools import chain, islice, zip_longest
from typing import TypeVar

T = TypeVar("T")
MISSING = object()


def take_in_turns(groups: Iterable[Sequence[T]], limit: int) -> list[T]:
    """Returns the first problems of the groups in turns, so that a small number of them covers all groups."""
    rounds = chain.from_iterable(zip_longest(*groups, fillvalue=MISSING))
    return list(islice((problem for problem in rounds if problem is not MISSING), limit))
