"""What the models are taught, as losses over a batch of rows.

The draft only writes. So does the base of the target, which then learns to keep every token readable at its top. The
layers on top of that base notice and judge, and are led there step by step, by small heads thrown away afterwards:

- *odd*, of every token: is it another than the base foresaw, one place back? To hold two tokens against each other is
  what is hardest to find by chance, so it is asked densely, with many words replaced (rows.Writer.scrambled);
- *slip*, of every token: is it the first wrong one?  Most odd tokens are only worded otherwise;
- *astray*, of every token: is the text up to here right?
- the probes' one word, at the top.
"""

import time
from copy import deepcopy
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PreTrainedModel

from parse.prompts import VerificationSuffix
from training.attention import TREE_ATTENTION
from training.rows import IGNORED, Batch

Lesson = tuple[Tensor, dict[str, float]]

SLIP_AT, ASTRAY_AT = 0.7, 0.85  # heights in the stack, as shares of its layers
RECALL_WEIGHT, FLAG_WEIGHT, VERDICT_WEIGHT = 0.3, 0.3, 0.5
ODD_AFTER = 2  # layers above the base
SLIP_RARITY = 5.0  # one token in a hundred is a slip


class Writing(nn.Module):
    """Next tokens only."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Lesson:
        hidden = _hidden_states(self.model, batch)
        return self.writing(hidden[-1], batch)

    def writing(self, top: Tensor, batch: Batch) -> Lesson:
        at = batch.next_token != IGNORED
        logits = _logits(self.model, top[at])
        wanted = batch.next_token[at]
        loss = cross_entropy(logits, wanted)
        return loss, {"write": loss.item(), "write_hits": _share(logits.argmax(-1) == wanted)}


class Recalling(Writing):
    """Next tokens, while the token just read stays readable at the top: what is to be judged must not be forgotten."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.recall = nn.Linear(model.config.hidden_size, model.config.vocab_size)

    def forward(self, batch: Batch) -> Lesson:
        hidden = _hidden_states(self.model, batch)
        loss, metrics = self.writing(hidden[-1], batch)
        at = batch.astray != IGNORED
        recalled, wanted = self.recall(hidden[-1][at].float()), batch.tokens[at]
        metrics["recall_hits"] = _share(recalled.argmax(-1) == wanted)
        return loss + RECALL_WEIGHT * cross_entropy(recalled, wanted), metrics


class Deciding(Writing):
    """Next tokens and verdicts."""

    def __init__(self, model: PreTrainedModel, check: VerificationSuffix) -> None:
        super().__init__(model)
        self.check = check

    def forward(self, batch: Batch) -> Lesson:
        top = _hidden_states(self.model, batch)[-1]
        writing, metrics = self.writing(top, batch)
        verdict, judged = self.verdict(top, batch)
        return writing + VERDICT_WEIGHT * verdict, metrics | judged

    def verdict(self, top: Tensor, batch: Batch) -> Lesson:
        if not len(batch.verdict):
            return top.new_zeros(()), {}
        logits = _logits(self.model, top[batch.verdict_at[:, 0], batch.verdict_at[:, 1]])
        loss = cross_entropy(logits, batch.verdict)
        right = batch.verdict == self.check.correct_token_ids[0]
        passed = logits[:, self.check.correct_token_ids[0]] > logits[:, self.check.incorrect_token_ids[0]]
        return loss, {
            "verdict": loss.item(),
            "right_passed": _share(passed[right]),
            "wrong_failed": _share(~passed[~right]),
        }


class Judging(Deciding):
    """Next tokens, slips, and verdicts."""

    def __init__(self, model: PreTrainedModel, check: VerificationSuffix, base_layers: int) -> None:
        super().__init__(model, check)
        self.base_layers = base_layers
        self.base_norm = deepcopy(cast(nn.Module, model.base_model.norm)).requires_grad_(False)
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        self.slip_at, self.astray_at = (round(layers * height) for height in (SLIP_AT, ASTRAY_AT))
        self.odd, self.slip, self.astray = nn.Linear(width, 1), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Lesson:
        hidden = _hidden_states(self.model, batch)
        writing, metrics = self.writing(hidden[-1], batch)
        odd, odd_metrics = self._odd(hidden, batch)
        slip, flagged = self._flag(self.slip, hidden[self.slip_at], batch.slip, SLIP_RARITY)
        astray, lost = self._flag(self.astray, hidden[self.astray_at], batch.astray, 1.0)
        verdict, judged = self.verdict(hidden[-1], batch)
        metrics |= judged | odd_metrics
        metrics |= {
            "slip_found": _share(flagged[batch.slip == 1] > 0),
            "slip_cried": _share(flagged[batch.slip == 0] > 0),
        }
        metrics |= {
            "astray_hits": _share((lost > 0)[batch.astray != IGNORED] == (batch.astray == 1)[batch.astray != IGNORED])
        }
        return writing + FLAG_WEIGHT * (odd + slip + astray) + VERDICT_WEIGHT * verdict, metrics

    def _odd(self, hidden: tuple[Tensor, ...], batch: Batch) -> Lesson:
        """Is the token another than the base foresaw? Its foresight stands in the stream, one place back."""
        with torch.no_grad():
            foreseen = _logits(self.model, self.base_norm(hidden[self.base_layers][:, :-1])).argmax(-1)
        known = batch.astray[:, 1:] != IGNORED
        odd = (foreseen != batch.tokens[:, 1:])[known]
        scores = self.odd(hidden[self.base_layers + ODD_AFTER][:, 1:][known].float()).squeeze(-1)
        loss = binary_cross_entropy_with_logits(scores, odd.float())
        return loss, {"odd_found": _share(scores[odd] > 0), "odd_cried": _share(scores[~odd] > 0)}

    @staticmethod
    def _flag(head: nn.Module, hidden: Tensor, wanted: Tensor, rarity: float) -> tuple[Tensor, Tensor]:
        scores = head(hidden.float()).squeeze(-1)
        known = wanted != IGNORED
        weight = scores.new_tensor(rarity)
        return binary_cross_entropy_with_logits(scores[known], wanted[known].float(), pos_weight=weight), scores


def _hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Of every layer; the last one normed, ready for the head."""
    assert model.config._attn_implementation == TREE_ATTENTION
    visible = torch.zeros(batch.visible.shape, dtype=torch.bfloat16, device=batch.tokens.device)
    visible.masked_fill_(~batch.visible, -1e30)
    device = batch.tokens.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=half_pays(device)):
        out = model.base_model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            visible=visible,
            output_hidden_states=True,
            use_cache=False,
        )
    hidden: tuple[Tensor, ...] = out.hidden_states
    return hidden


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    assert head is not None
    return head(hidden.float())


@cache
def half_pays(device: str) -> bool:
    """Is bfloat16 the faster arithmetic here? Always on a GPU, on a CPU only where it has instructions for it."""
    if device != "cpu":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 128, dtype=dtype), torch.ones(128, 384, dtype=dtype)
        torch.mm(a, b)
        started = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        seconds[dtype] = time.perf_counter() - started
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def _share(hits: Tensor) -> float:
    return hits.float().mean().item() if hits.numel() else float("nan")
