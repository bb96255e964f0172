"""Writes the model cards of heads and adapters from their figures."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from training.evaluate import round_floats

CARD = """---
library_name: parse-serve
---
# {name}

{what} for `{target}`: it proposes tokens, which the target verifies in one pass.
It has no embeddings of its own and cannot be used without its target. `parse.speculative` loads it. The layout is that
of EAGLE-3's authors{extra}.

| | |
| --- | --- |
| parameters | {parameters:.2f} million, {layers} layer{plural}, {vocabulary} of the target's {vocab_size} tokens |
| reads | `hidden_states` {aux_layers} of the target |
| trained | {trained} that the target wrote |

## What it scores

Greedy, on {proof} texts of the target that training never saw, one half from a plain prompt, the other continuing
an accepted prefix in other words. The *length* is the number of tokens per pass of the target: the accepted ones and
the target's own. The time is that of one proposal on one thread, with the new tokens of the sequence.

| | tokens proposed | length | ms |
| --- | --- | --- | --- |
{lengths}

Share of passes in which the proposed token at a position was accepted:

| | {places} |
| --- | {rules} |
{shares}

![accuracy during training: how often it predicts the target's choice, by tokens ahead](training.svg)

All figures: `figures.json`; measured again by `python -m training.acceptance --head {folder}`.
"""

SPACE_CARD = """---
library_name: parse-serve
---
# {name}

Adapters that make `{target}` propose by itself, for decoding with SPACE: at masks, a small network after
every layer lets it predict up to {masks} tokens after the next one. At all other tokens it computes the same
as without the adapters, bit for bit. `parse.speculative` loads them. They cannot be used without their target.

| | |
| --- | --- |
| parameters | {parameters:.2f} million: an embedding of masks, networks of rank {rank} after each of {layers} layers |
| trained | {trained} that the target wrote; the target itself was frozen |

## What it scores

Greedy, on {proof} texts of the target that training never saw, one half from a plain prompt, the other continuing
an accepted prefix in other words; with a group of {masks} masks after every candidate. The *length* is the
number of tokens per pass of the target: the accepted ones and the target's own. A proposal takes no time, but masks
make passes longer.

| | tokens proposed | length |
| --- | --- | --- |
{lengths}

Share of passes in which the proposed token at a position was accepted:

| | {places} |
| --- | {rules} |
{shares}

![accuracy during training: how often it predicts the target's choice, by tokens ahead](training.svg)

All figures: `figures.json`.
"""

EAGLE3, PARALLEL = "An EAGLE-3 head", "A parallel head"
EXTRA = ", with further layers, `mask_embedding` and `mask_hidden` beside it"


def write_head_card(folder: Path, target: str, metrics: Mapping[str, Any], trained: str) -> None:
    """Writes the card of a head into its folder."""
    config = json.loads((folder / "config.json").read_text())
    parallel = "parallel_tokens" in config
    layers = config["num_hidden_layers"]
    text = CARD.format(
        **_common_fields(folder, target, metrics, trained),
        folder=f"models/{folder.name}",
        what=PARALLEL if parallel else EAGLE3,
        extra=EXTRA if parallel else "",
        layers=layers,
        plural="s" * (layers > 1),
        vocabulary=config["draft_vocab_size"],
        vocab_size=config["vocab_size"],
        aux_layers=", ".join(map(str, config["eagle_aux_hidden_state_layer_ids"])),
        lengths="\n".join(
            f"| {name} | {stats['proposed']:.1f} | {stats['mean_accepted_length']:.2f} | {stats['propose_ms']:.2f} |"
            for name, stats in _table_rows(metrics)
        ),
    )
    _write(folder, text, metrics)


def write_space_card(folder: Path, target: str, metrics: Mapping[str, Any], trained: str) -> None:
    """Writes the card of SPACE adapters into their folder."""
    config = json.loads((folder / "config.json").read_text())
    text = SPACE_CARD.format(
        **_common_fields(folder, target, metrics, trained),
        masks=config["masks"],
        rank=config["rank"],
        layers=config["num_hidden_layers"],
        lengths="\n".join(
            f"| {name} | {stats['proposed']:.1f} | {stats['mean_accepted_length']:.2f} |"
            for name, stats in _table_rows(metrics)
        ),
    )
    _write(folder, text, metrics)


def _write(folder: Path, text: str, metrics: Mapping[str, Any]) -> None:
    (folder / "README.md").write_text(text)
    (folder / "figures.json").write_text(json.dumps(round_floats(dict(metrics)), indent=2) + "\n")


def _table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the figures by options and kind of text."""
    return [
        (f"{options_name}, {kind}", stats)
        for options_name, options in metrics["ways"].items()
        for kind, stats in options["of"].items()
    ]


def _common_fields(folder: Path, target: str, metrics: Mapping[str, Any], trained: str) -> dict[str, Any]:
    rows = _table_rows(metrics)
    num_positions = max(len(stats["accepted_at"]) for _, stats in rows)
    shares = (
        [f"{share:.1%}" for share in stats["accepted_at"]] + [""] * (num_positions - len(stats["accepted_at"]))
        for _, stats in rows
    )
    return {
        "name": folder.name,
        "target": target,
        "parameters": _count_parameters(folder) / 1e6,
        "trained": trained,
        "proof": metrics["texts"],
        "places": " | ".join(str(position + 1) for position in range(num_positions)),
        "rules": " | ".join(["---"] * num_positions),
        "shares": "\n".join(f"| {name} | {' | '.join(row)} |" for (name, _), row in zip(rows, shares, strict=True)),
    }


def _count_parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys() if name not in ("d2t", "t2d"))  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)
