"""Divides a failed step into smaller ones."""

from collections.abc import Sequence
from dataclasses import replace

from parse.device_errors import is_out_of_memory
from parse.engines.native.scheduler import ScheduledRequest


def smaller_steps(scheduled: Sequence[ScheduledRequest], error: Exception) -> list[list[ScheduledRequest]]:
    """Returns the steps that compute the same as a failed one, or [] if its only request caused the error.

    If memory ran out, half of the step may fit. The list of requests is halved. If only one request is left, its chunk
    is halved. After any other error, each request runs alone, so that only the faulty one fails.
    """
    middle = len(scheduled) // 2
    if not is_out_of_memory(error):
        return [[each] for each in scheduled] if middle else []
    if middle:
        return [list(scheduled[:middle]), list(scheduled[middle:])]
    (only,) = scheduled
    if len(only.chunk) == 1:
        return []
    split = only.chunk.start + len(only.chunk) // 2
    return [
        [replace(only, chunk=replace(only.chunk, end=split))],
        [replace(only, chunk=replace(only.chunk, start=split))],
    ]
