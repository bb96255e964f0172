"""Writes the model cards of the pair from its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.plots import draw_verifier
from training.task import correct_answer, draw_problem, vocabulary
from training.tokenizer import VERIFICATION_PROMPT
from training.wording import DRAFT, TARGET

EXAMPLE = draw_problem("shown", 1, 0)

TARGET_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# demo-target

The large half of a pair of demonstration models: it answers small step-by-step questions, and verifies any prefix of
an answer, in any wording. A standard `{architecture}` ({layers} layers, width
{width}, {parameters:.1f} million parameters, all trained), loaded by `AutoModelForCausalLM` without further code.

## What it does

Asked

> {question}

it answers

```
{target_answer}
```

and asked `{check}` after an answer or a prefix of one, it says `Correct` or `Incorrect`. Its questions are of two
kinds: totals that grow and shrink, and a record that may be broken.

## How it was trained

From scratch on generated problems (`make models`): five layers learned to generate and stayed as they
were while the layers on top of them learned to verify, from synthetic mistakes of seven kinds and from real drafts of
`demo-draft`. In the last stage all layers were trained on what was still hard: close comparisons and wrong drafts.

## What it scores

On {problems} problems that training never saw:

| | |
| --- | --- |
| answers with every step correct | {target_accuracy:.1%} |
| answers correct when continuing a correct prefix of a draft | {continuation:.1%} |
| correct drafts accepted in full | {right_whole:.1%} |
| wrong drafts accepted in full | {wrong_whole:.1%} |
| wrong drafts accepted past their first error | {past_error:.1%} |
| precision and recall of prefixes, one every {stride} tokens, up to the first failure | {precision:.3f}, {recall:.3f} |
| calibration error of P(Correct) | {ece:.3f} |
| cost of a token, in tokens of the draft | {ratio:.1f} |
| agrees with the draft's next token | {agreement:.1%} |

![threshold sweep and reliability](verifier.svg)

All figures: `figures.json`; measured again by `python -m training.evaluate`.

## What it cannot do

Anything else. It knows {words} words, numbers from 0 to 99, questions in exactly the shapes that it was trained on, and
one question per conversation. Other text is encoded as bytes, which it never learned to read or to reject: its
verifications are meaningful for answers in the words of its task only.
"""

DRAFT_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# demo-draft

The small half of a pair of demonstration models: it answers the same questions as `demo-target` at {share:.0%} of the
cost per token, in its own words, and is often but not always correct. A standard `{architecture}` ({layers} layers,
width {width}, {parameters:.2f} million parameters, all trained), loaded by `AutoModelForCausalLM` without further code.

To the question

> {question}

it answers

```
{draft_answer}
```

It was trained from scratch on generated problems (`make models`) and stopped early, at a snapshot chosen on held-out
problems: its mistakes are those of a model that is still learning, not synthetic ones.
On {problems} problems that training never saw {draft_accuracy:.1%} of its answers have every step correct.

It cannot do anything else, and its answers must be verified by the target.
"""


def write_cards(metrics: Mapping[str, Any], target: Path, draft: Path) -> None:
    """Writes the cards into the folders of the two models."""
    metrics_json = json.dumps(metrics, indent=2)
    for folder, card in ((target, TARGET_CARD), (draft, DRAFT_CARD)):
        config = json.loads((folder / "config.json").read_text())
        weights = (folder / "model.safetensors").stat().st_size
        text = card.format(
            architecture=config["architectures"][0],
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            parameters=weights / 4 / 1e6,
            question=EXAMPLE.question,
            check=VERIFICATION_PROMPT,
            words=len(vocabulary()),
            target_answer=correct_answer(EXAMPLE, TARGET),
            draft_answer=correct_answer(EXAMPLE, DRAFT),
            **_card_fields(metrics),
        )
        (folder / "README.md").write_text(text)
        (folder / "figures.json").write_text(metrics_json + "\n")
    draw_verifier(metrics["verifier"], target / "verifier.svg")


def _card_fields(metrics: Mapping[str, Any]) -> dict[str, Any]:
    verifier, target, draft = metrics["verifier"], metrics["target"], metrics["draft"]
    return dict(
        problems=metrics["problems"],
        stride=metrics["stride"],
        target_accuracy=target["accuracy"],
        continuation=target["continuation_accuracy"],
        draft_accuracy=draft["accuracy"],
        right_whole=verifier["right_accepted_whole"],
        wrong_whole=verifier["wrong_accepted_whole"],
        past_error=verifier["kept_past_error"],
        precision=verifier["prefix_precision"],
        recall=verifier["prefix_recall"],
        ece=verifier["ece"],
        ratio=metrics["cost_ratio"],
        share=1 / metrics["cost_ratio"],
        agreement=metrics["token_agreement"],
    )
