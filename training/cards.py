"""Writes the model cards of the demo pair from its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.confidence import format_share
from training.plots import draw_verifier
from training.provenance import provenance_sentence, write_document
from training.task import correct_answer, draw_problem, vocabulary
from training.tokenizer import VERIFICATION_PROMPT
from training.wording import DRAFT, TARGET

EXAMPLE = draw_problem("shown", 1, 0)
UNRECORDED = "by an earlier version of `make models`, which recorded no command, processor and versions."

TARGET_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# demo-target

This is the large model of a pair of demonstration models. It answers small step-by-step questions, and it verifies any
prefix of an answer, in any wording. It is a standard `{architecture}` with {layers} layers of width {width} and
{parameters:.1f} million parameters. `AutoModelForCausalLM` loads it without further code.

## What it does

To the question

> {question}

it answers

```
{target_answer}
```

If `{prompt}` follows an answer or a prefix of one, it says `Correct` or `Incorrect`. There are two kinds of questions:
a total that grows and shrinks, and a record that can be broken.

## How it was trained

It was trained from scratch on generated problems (`make models`). Five layers learned to generate. They stayed
unchanged while the layers above them learned to verify, from synthetic mistakes of seven kinds and from real drafts of
`demo-draft`. In the last stage all layers were trained on difficult cases: close comparisons and wrong drafts.

## Figures

On {problems} problems that training never saw (split `{split}`, seed {seed}), with a prefix every {stride} tokens, a
threshold of {full} for complete drafts and {prefix} for prefixes. {wrong_count} of the drafts are wrong. 95% confidence
intervals are in parentheses.

| | |
| --- | --- |
| answers with every step correct | {target_accuracy} |
| answers correct if the target continues a correct prefix of a draft | {continuation} |
| correct drafts accepted in full | {right_whole} |
| wrong drafts accepted in full | {wrong_whole} |
| wrong drafts accepted past their first error | {past_error} |
| precision of accepted prefixes | {precision} |
| recall of accepted prefixes | {recall} |
| calibration error of P(correct) | {ece:.3f} |
| time of a token, relative to a token of the draft model | {ratio:.1f} |
| next tokens of drafts that the target would choose as well | {agreement:.1%} |

![threshold sweep and reliability](verifier.svg)

Measured {provenance}
All figures are in `figures.json`. `make evaluate` measures them again.

## Limitations

The model cannot do anything else. It knows {words} words, numbers from 0 to 99, questions of exactly the forms that it
was trained on, and one question per conversation. Other text is encoded as bytes, which the model was never trained
on. Its verifications are meaningful only for answers in the words of its task.
"""

DRAFT_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# demo-draft

This is the small model of a pair of demonstration models. It answers the same questions as `demo-target` in its own
words, at {share:.0%} of the time per token. Its answers are often correct, but not always. It is a standard
`{architecture}` with {layers} layers of width {width} and {parameters:.2f} million parameters. `AutoModelForCausalLM`
loads it without further code.

To the question

> {question}

it answers

```
{draft_answer}
```

It was trained from scratch on generated problems (`make models`). Training stopped early, at a snapshot that was chosen
on held-out problems, so its mistakes are those of a model that is still learning.

On {problems} problems that training never saw (split `{split}`, seed {seed}), {draft_accuracy} of its answers have
every step correct. The 95% confidence interval is in parentheses.
Measured {provenance}

The model cannot do anything else, and the target must verify its answers.
"""


def write_cards(metrics: Mapping[str, Any], target: Path, draft: Path) -> None:
    """Writes figures and cards into the folders of the two models, and a picture into the target's."""
    for folder, template in ((target, TARGET_CARD), (draft, DRAFT_CARD)):
        write_document(folder / "figures.json", metrics)
        (folder / "README.md").write_text(render_card(metrics, folder, template))
    draw_verifier(metrics["verifier"], target / "verifier.svg")


def render_card(metrics: Mapping[str, Any], folder: Path, template: str) -> str:
    """Returns the text of a card. It depends on the figures, the config and the weights only."""
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").stat().st_size
    return template.format(
        architecture=config["architectures"][0],
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        parameters=weights / 4 / 1e6,
        question=EXAMPLE.question,
        prompt=VERIFICATION_PROMPT,
        words=len(vocabulary()),
        target_answer=correct_answer(EXAMPLE, TARGET),
        draft_answer=correct_answer(EXAMPLE, DRAFT),
        **_card_fields(metrics),
    )


def _card_fields(metrics: Mapping[str, Any]) -> dict[str, Any]:
    verifier, target, draft = metrics["verifier"], metrics["target"], metrics["draft"]
    return dict(
        problems=metrics["problems"],
        split=metrics["split"],
        seed=metrics["seed"],
        stride=metrics["stride"],
        full=metrics["thresholds"]["full"],
        prefix=metrics["thresholds"]["prefix"],
        target_accuracy=_share(target, "accuracy"),
        continuation=_share(target, "continuation_accuracy"),
        draft_accuracy=_share(draft, "accuracy"),
        right_whole=_share(verifier, "right_accepted_whole"),
        wrong_whole=_share(verifier, "wrong_accepted_whole"),
        wrong_count=verifier["wrong_accepted_whole_count"],
        past_error=_share(verifier, "kept_past_error"),
        precision=_share(verifier, "prefix_precision"),
        recall=_share(verifier, "prefix_recall"),
        ece=verifier["ece"],
        ratio=metrics["cost_ratio"],
        share=1 / metrics["cost_ratio"],
        agreement=metrics["token_agreement"],
        provenance=provenance_sentence(metrics["run"]) if metrics["run"] else UNRECORDED,
    )


def _share(figures: Mapping[str, Any], name: str) -> str:
    return format_share(figures[name], figures[f"{name}_interval"])
