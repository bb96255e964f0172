"""The argument and the result of each method's `load` function.

To add a method, write a module with a `Proposer` and a `load` function, and add it to `parse.registry.METHODS`.
"""

from dataclasses import dataclass
from typing import Any

from parse.engines.native.checkpoint import Dtype
from parse.engines.native.model import MaskEmbedder, Model
from parse.speculative.proposal import Proposer

DEFAULT_CHAIN_LENGTH = 12  # tokens of a proposal without branches, for methods whose checkpoint names no number


class ProposerLoadError(ValueError):
    """Raised for a checkpoint that cannot be used, or does not fit the target."""


@dataclass(frozen=True)
class LoadContext:
    """The engine that a method is loaded for."""

    target: Model
    device: str  # as in the settings, for methods that load their own model
    dtype: Dtype


@dataclass(frozen=True)
class LoadedProposer:
    """A method that is ready to use."""

    proposer: Proposer[Any]
    max_tokens: int  # in a proposal
    mask_embedder: MaskEmbedder | None = None  # what the target reads at masks, if the method proposes masks
