"""The argument and the result of each method's `load` function.

To add a method, write a module with a `Proposer` (`parse/speculative/proposal.py`) and a `load` function, and add it to
`parse.registry.METHODS`.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.engines.native.checkpoint import Dtype
from parse.engines.native.model import MaskEmbedder
from parse.speculative.proposal import Proposer

DEFAULT_CHAIN_LENGTH = 12  # tokens of a proposal without branches, for methods whose checkpoint names no number


class ProposerLoadError(ValueError):
    """Raised for a checkpoint that cannot be used, or does not fit the target."""


@dataclass(frozen=True)
class LoadContext:
    """The target that a method is loaded for."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str  # as in the settings, for methods that load their own model
    dtype: Dtype

    @property
    def vocab_size(self) -> int:
        size: int = self.network.config.get_text_config().vocab_size
        return size


@dataclass(frozen=True)
class LoadedProposer:
    """A method that is ready to use."""

    proposer: Proposer[Any]
    max_tokens: int  # in a proposal
    mask_embedder: MaskEmbedder | None = None  # what the target reads at masks, if the method proposes masks
