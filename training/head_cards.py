"""The card of a head, written from its figures."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from training.evaluate import rounded

CARD = """---
library_name: parse-serve
---
# {name}

{what} for `{target}`: it proposes tokens, which the target then checks in one pass.
It has no embeddings of its own and is of no use without its target. `parse.speculate` loads it; the layout is that of
EAGLE-3's authors{extra}.

| | |
| --- | --- |
| parameters | {parameters:.2f} million, {layers} layer{plural}, {vocabulary} of the target's {whole} tokens |
| reads | `hidden_states` {taps} of the target |
| trained | {trained} that the target wrote |

## What it scores

Greedy, on {proof} texts of the target that training never saw, one half from a plain prompt, the other going on after
the beginning of an answer in other words. The *length* is what one pass of the target yields: the accepted tokens and
the target's own one. The time is that of one proposal on one thread, reading the new tokens included.

| | tokens proposed | length | ms |
| --- | --- | --- | --- |
{lengths}

Share of passes in which the proposed token at a place was accepted:

| | {places} |
| --- | {rules} |
{shares}

![what it learnt: how often its choice is the target's, by tokens ahead](training.svg)

All figures: `figures.json`; measured again by `python -m training.acceptance --head {folder}`.
"""

EAGLE3, PARALLEL = "An EAGLE-3 head", "A parallel head"
EXTRA = ", with further layers, `mask_embedding` and `mask_hidden` beside it"


def write_card(folder: Path, target: str, found: Mapping[str, Any], trained: str) -> None:
    """Into the folder of the head."""
    config = json.loads((folder / "config.json").read_text())
    parallel = "parallel_tokens" in config
    rows = [(f"{way}, {kind}", of) for way, each in found["ways"].items() for kind, of in each["of"].items()]
    wide = max(len(of["accepted_at"]) for _, of in rows)
    shares = (
        [f"{share:.1%}" for share in of["accepted_at"]] + [""] * (wide - len(of["accepted_at"])) for _, of in rows
    )
    layers = config["num_hidden_layers"]
    text = CARD.format(
        name=folder.name,
        folder=f"models/{folder.name}",
        what=PARALLEL if parallel else EAGLE3,
        extra=EXTRA if parallel else "",
        target=target,
        parameters=_parameters(folder) / 1e6,
        layers=layers,
        plural="s" * (layers > 1),
        vocabulary=config["draft_vocab_size"],
        whole=config["vocab_size"],
        taps=", ".join(map(str, config["eagle_aux_hidden_state_layer_ids"])),
        trained=trained,
        proof=found["texts"],
        lengths="\n".join(
            f"| {name} | {of['proposed']:.1f} | {of['mean_accepted_length']:.2f} | {of['propose_ms']:.2f} |"
            for name, of in rows
        ),
        places=" | ".join(str(place + 1) for place in range(wide)),
        rules=" | ".join(["---"] * wide),
        shares="\n".join(f"| {name} | {' | '.join(row)} |" for (name, _), row in zip(rows, shares, strict=True)),
    )
    (folder / "README.md").write_text(text)
    (folder / "figures.json").write_text(json.dumps(rounded(dict(found)), indent=2) + "\n")


def _parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys() if name not in ("d2t", "t2d"))  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)
