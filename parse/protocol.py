"""Moved; kept while imports are rewritten."""

from typing import Literal

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

Mode = Literal["auto", "full", "progressive", "rounds", "exact", "off"]
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
