"""Moved; kept while imports are rewritten."""

from parse.engines.protocol import Drafter, Verifier
from parse.events import (
    Event,
    Fallback,
    Finished,
    Origin,
    Stage,
    StageName,
    TextDelta,
    Usage,
    Verification,
)
from parse.requests import GenerationRequest
from parse.types import NO_STREAMING

Mode = str
__all__ = [
    "NO_STREAMING",
    "Drafter",
    "Event",
    "Fallback",
    "Finished",
    "GenerationRequest",
    "Mode",
    "Origin",
    "Stage",
    "StageName",
    "TextDelta",
    "Usage",
    "Verification",
    "Verifier",
]
