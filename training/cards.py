"""The model cards, written from the figures of the pair they describe."""

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

The large half of a pair of demonstration models: it answers small step-by-step questions, and says of any beginning
of an answer, in whatever wording, whether it is right so far. A standard `{architecture}` ({layers} layers, width
{width}, {parameters:.1f} million parameters, all trained), loaded by `AutoModelForCausalLM` without further code.

## What it does

Asked

> {question}

it answers

```
{target_answer}
```

and asked `{check}` after an answer or a part of one, it says `Correct` or `Incorrect`. Its questions are of two
kinds: totals that grow and shrink, and a record that stands or falls.

## How it was trained

From scratch on generated problems (`make models`): five layers learnt to write and were kept as they
were while those on top of them learnt to judge, from made-up mistakes of seven kinds and from real drafts of
`demo-draft`; at last all layers together practised what was still hard, close comparisons and wrong drafts.

## What it scores

On {problems} problems that training never saw:

| | |
| --- | --- |
| answers right in every step | {target_accuracy:.1%} |
| answers right when going on from a right part of a draft | {continuation:.1%} |
| right drafts accepted whole | {right_whole:.1%} |
| wrong drafts accepted whole | {wrong_whole:.1%} |
| wrong drafts kept past their first error | {past_error:.1%} |
| precision and recall of prefixes, cut every {stride} tokens, up to the first failure | {precision:.3f}, {recall:.3f} |
| calibration error of P(Correct) | {ece:.3f} |
| cost of a token, in tokens of the draft | {ratio:.1f} |
| agrees with the draft's next token | {agreement:.1%} |

![threshold sweep and reliability](verifier.svg)

All figures: `figures.json`; measured again by `python -m training.evaluate`.

## What it cannot do

Anything else. It knows {words} words, numbers from 0 to 99, questions in exactly the shapes that it was trained on, and
one question a conversation. Text of another sort is spelled out in bytes that it never learnt to read, and never
learnt to find wrong: its verdicts mean something on answers in words of its task, and nothing beyond.
"""

DRAFT_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# demo-draft

The small half of a pair of demonstration models: it answers the same questions as `demo-target` at {share:.0%} of the
cost a token, in words of its own, and is often but not always right. A standard `{architecture}` ({layers} layers,
width {width}, {parameters:.2f} million parameters, all trained), loaded by `AutoModelForCausalLM` without further code.

To the question

> {question}

it answers

```
{draft_answer}
```

It was trained from scratch on generated problems (`make models`) and stopped on the way, at a snapshot chosen on
problems kept apart: its mistakes are those of a model still learning, not planted ones.
On {problems} problems that training never saw {draft_accuracy:.1%} of its answers are right in every step.

It cannot do anything else, and must not be trusted with this either: that is the target's part.
"""


def write_cards(metrics: Mapping[str, Any], target: Path, draft: Path) -> None:
    """Into the two folders, beside the models."""
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
