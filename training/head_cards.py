"""Writes the model cards of heads and adapters from their figures."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from training.confidence import format_ratio
from training.evaluate import round_floats
from training.head_checkpoints import SPACE_ARCHITECTURE
from training.outputs import DEMO_DRAFT
from training.provenance import provenance_sentence, write_document

UNRECORDED = "by an earlier version of this program, which recorded no command, processor and versions."

CARD = """---
library_name: parse-serve
---
# {name}

{what} for `{target}`, its target. It proposes tokens, which the target verifies in one pass. It has no embeddings of
its own and cannot be used without its target. `parse.speculative` loads it. The layout is that of EAGLE-3's
authors{extra}.

| | |
| --- | --- |
| parameters | {parameters:.2f} million, {layers} layer{plural}, {vocabulary} of the target's {vocab_size} tokens |
| reads | `hidden_states` {aux_layers} of the target |
| trained | {trained} |

## Figures

Greedy decoding of {texts} texts that training never saw. Half of them answer a plain prompt. The other half continue
{beginnings}. The *length* is the number of tokens per pass of the target, including the target's own
token, with its 95% confidence interval over texts. The time is that of one proposal on one thread, including the time
to read the new tokens of the sequence.

| | tokens proposed | length | ms |
| --- | --- | --- | --- |
{lengths}

The share of passes in which the proposed token at a position was accepted:

| | {positions} |
| --- | {rules} |
{shares}

![accuracy during training: how often the head predicts the target's choice, by tokens ahead](training.svg)

Measured {provenance}
All figures are in `figures.json`. They are measured again with
`python -m training.acceptance --head {folder}{target_option} --card`.
"""

SPACE_CARD = """---
library_name: parse-serve
---
# {name}

These adapters let `{target}` propose tokens by itself, for decoding with SPACE. At masks, a small network after every
layer lets the target predict up to {masks} tokens after the next one. At all other tokens the target computes the same
as without the adapters, bit for bit. `parse.speculative` loads them. They cannot be used without their target.

| | |
| --- | --- |
| parameters | {parameters:.2f} million: an embedding of masks, networks of rank {rank} after each of {layers} layers |
| trained | {trained}; the target itself was frozen |

## Figures

Greedy decoding of {texts} texts that training never saw, with a group of {masks} masks after every candidate. Half of
the texts answer a plain prompt. The other half continue an accepted prefix in other words. The *length* is the number
of tokens per pass of the target, including the target's own token, with its 95% confidence interval over texts. A
proposal takes no time, but masks make passes longer.

| | tokens proposed | length |
| --- | --- | --- |
{lengths}

The share of passes in which the proposed token at a position was accepted:

| | {positions} |
| --- | {rules} |
{shares}

![accuracy during training: how often a mask predicts the target's choice, by tokens ahead](training.svg)

Measured {provenance}
All figures are in `figures.json`. They are measured again with
`python -m training.acceptance --head {folder}{target_option} --card`.
"""

DEFAULT_TARGET = "demo-target"  # of training.acceptance
ACCEPTED_PREFIX = "an accepted prefix in other words"
CORRECTION = "a draft after a correction by the target of the pair"
EAGLE3, PARALLEL = "This is an EAGLE-3 head", "This is a parallel head"
EXTRA = ", with further layers, `mask_embedding` and `mask_hidden` beside it"


def write_card(folder: Path, metrics: Mapping[str, Any], target: str = DEFAULT_TARGET) -> None:
    """Writes the figures and the card of a head, or of adapters of SPACE, into its folder."""
    metrics = round_floats({"target": target, **metrics})
    write_document(folder / "figures.json", metrics)
    (folder / "README.md").write_text(render_card(folder, metrics))


def render_card(folder: Path, metrics: Mapping[str, Any]) -> str:
    """Returns the text of a card. It depends on the figures, the config and the weights only."""
    return (_render_space_card if is_space(folder) else _render_head_card)(folder, metrics)


def read_figures(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures


def is_space(folder: Path) -> bool:
    """Returns whether a folder holds adapters of SPACE."""
    return SPACE_ARCHITECTURE in json.loads((folder / "config.json").read_text()).get("architectures", ())


def _render_head_card(folder: Path, metrics: Mapping[str, Any]) -> str:
    config = json.loads((folder / "config.json").read_text())
    parallel = "parallel_tokens" in config
    layers = config["num_hidden_layers"]
    return CARD.format(
        **_common_fields(folder, metrics),
        what=PARALLEL if parallel else EAGLE3,
        beginnings=CORRECTION if metrics["target"] == DEMO_DRAFT else ACCEPTED_PREFIX,
        extra=EXTRA if parallel else "",
        layers=layers,
        plural="s" * (layers > 1),
        vocabulary=config["draft_vocab_size"],
        vocab_size=config["vocab_size"],
        aux_layers=", ".join(map(str, config["eagle_aux_hidden_state_layer_ids"])),
        lengths="\n".join(
            f"| {name} | {stats['proposed']:.1f} | {_length(stats)} | {stats['propose_ms']:.2f} |"
            for name, stats in _table_rows(metrics)
        ),
    )


def _render_space_card(folder: Path, metrics: Mapping[str, Any]) -> str:
    config = json.loads((folder / "config.json").read_text())
    return SPACE_CARD.format(
        **_common_fields(folder, metrics),
        masks=config["masks"],
        rank=config["rank"],
        layers=config["num_hidden_layers"],
        lengths="\n".join(
            f"| {name} | {stats['proposed']:.1f} | {_length(stats)} |" for name, stats in _table_rows(metrics)
        ),
    )


def _length(stats: Mapping[str, Any]) -> str:
    return format_ratio(stats["mean_accepted_length"], stats["mean_accepted_length_interval"])


def _table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the figures by options and kind of text."""
    return [
        (f"{options_name}, {kind}", stats)
        for options_name, options in metrics["ways"].items()
        for kind, stats in options["of"].items()
    ]


def _common_fields(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    rows = _table_rows(metrics)
    num_positions = max(len(stats["accepted_at"]) for _, stats in rows)
    shares = (
        [f"{share:.1%}" for share in stats["accepted_at"]] + [""] * (num_positions - len(stats["accepted_at"]))
        for _, stats in rows
    )
    return {
        "name": folder.name,
        "folder": f"models/{folder.name}",
        "target": metrics["target"],
        "target_option": "" if metrics["target"] == DEFAULT_TARGET else f" --target models/{metrics['target']}",
        "parameters": _count_parameters(folder) / 1e6,
        "trained": metrics["trained"],
        "texts": metrics["texts"],
        "positions": " | ".join(str(position + 1) for position in range(num_positions)),
        "rules": " | ".join(["---"] * num_positions),
        "shares": "\n".join(f"| {name} | {' | '.join(row)} |" for (name, _), row in zip(rows, shares, strict=True)),
        "provenance": provenance_sentence(metrics["run"]) if metrics["run"] else UNRECORDED,
    }


def _count_parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys() if name not in ("d2t", "t2d"))  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)
