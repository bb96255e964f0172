"""Finds the positions at which a model's rotary embeddings change.

LongRoPE and dynamic NTK scaling choose the frequencies by the largest position of a forward pass. A step packs the
tokens of several requests, so one long request would change the logits of all others. Such a model is served up to the
position where its frequencies change. Below it, every pass uses the same frequencies.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

# The types whose frequencies depend on the pass, and the setting that holds the position where they change.
LIMITING_SETTINGS = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}


def max_sequence_length(config: PretrainedConfig) -> int | None:
    """Returns the largest number of tokens whose frequencies do not depend on other sequences of the pass."""
    limits = [
        limit
        for rope in _rope_parameters(config)
        if (name := LIMITING_SETTINGS.get(rope.get("rope_type", "default")))
        and (limit := rope.get(name) or getattr(config, name, None))
    ]
    return min(limits, default=None)


def position_thresholds(config: PretrainedConfig) -> list[int]:
    """Returns all positions in the config at which a model may compute differently, in ascending order."""
    names = "max_position_embeddings", "original_max_position_embeddings", "sliding_window"
    sources: list[Mapping[str, Any]] = [config.to_dict(), *_rope_parameters(config)]
    return sorted({value for source in sources for name in names if isinstance(value := source.get(name), int)})


def _rope_parameters(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yields the parameters of all layers, or those of each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (each for each in parameters.values() if isinstance(each, Mapping))
