"""What the two models are taught, as losses over a batch of rows.

The draft only writes. The target writes and judges, and everything it needs is taught from the first step on:

- its prediction must stand halfway up the stack, so that the layers above can hold it against the token that came;
- from there two small heads, thrown away afterwards, ask of *every* token whether it is the first wrong one and
  whether the text up to it is right: a hundred times more signal than the probes' one word each;
- the probes' one word, at the top.
"""

import time
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PreTrainedModel

from parse.prompts import Check
from training.attention import TREE_ATTENTION
from training.rows import IGNORED, Batch

Lesson = tuple[Tensor, dict[str, float]]

SLIP_AT, ASTRAY_AT = 0.6, 0.8  # heights in the stack, as shares of its layers
HALFWAY_WEIGHT, FLAG_WEIGHT, VERDICT_WEIGHT = 0.3, 0.3, 0.5
SLIP_RARITY = 5.0  # one token in a hundred is a slip


class Writing(nn.Module):
    """Next tokens only."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Lesson:
        hidden = _hidden_states(self.model, batch)
        loss, metrics = self.writing(hidden[-1], batch)
        return loss, metrics

    def writing(self, top: Tensor, batch: Batch, name: str = "write") -> Lesson:
        at = batch.next_token != IGNORED
        logits = _logits(self.model, top[at])
        wanted = batch.next_token[at]
        loss = cross_entropy(logits, wanted)
        return loss, {name: loss.item(), f"{name}_hits": _share(logits.argmax(-1) == wanted)}


class Judging(Writing):
    """Next tokens, slips, and verdicts."""

    def __init__(self, model: PreTrainedModel, check: Check, halfway: int) -> None:
        super().__init__(model)
        self.check, self.halfway = check, halfway
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        self.slip_at, self.astray_at = (round(layers * height) for height in (SLIP_AT, ASTRAY_AT))
        self.slip, self.astray = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Lesson:
        hidden = _hidden_states(self.model, batch)
        writing, metrics = self.writing(hidden[-1], batch)
        halfway, more = self.writing(self.model.base_model.norm(hidden[self.halfway]), batch, "halfway")
        slip, flagged = self._flag(self.slip, hidden[self.slip_at], batch.slip, SLIP_RARITY)
        astray, lost = self._flag(self.astray, hidden[self.astray_at], batch.astray, 1.0)
        verdict, judged = self._verdict(hidden[-1], batch)
        metrics |= more | judged
        metrics |= {"slip_found": _share(flagged[batch.slip == 1] > 0), "slip_cried": _share(flagged[batch.slip == 0] > 0)}
        metrics |= {"astray_hits": _share((lost > 0)[batch.astray != IGNORED] == (batch.astray == 1)[batch.astray != IGNORED])}
        return writing + HALFWAY_WEIGHT * halfway + FLAG_WEIGHT * (slip + astray) + VERDICT_WEIGHT * verdict, metrics

    @staticmethod
    def _flag(head: nn.Module, hidden: Tensor, wanted: Tensor, rarity: float) -> tuple[Tensor, Tensor]:
        scores = head(hidden.float()).squeeze(-1)
        known = wanted != IGNORED
        weight = scores.new_tensor(rarity)
        return binary_cross_entropy_with_logits(scores[known], wanted[known].float(), pos_weight=weight), scores

    def _verdict(self, top: Tensor, batch: Batch) -> Lesson:
        if not len(batch.verdict):
            return top.new_zeros(()), {}
        logits = _logits(self.model, top[batch.verdict_at[:, 0], batch.verdict_at[:, 1]])
        loss = cross_entropy(logits, batch.verdict)
        right = batch.verdict == self.check.correct
        passed = logits[:, self.check.correct] > logits[:, self.check.incorrect]
        return loss, {"verdict": loss.item(), "right_passed": _share(passed[right]), "wrong_failed": _share(~passed[~right])}


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
    return head(hidden.float())  # type: ignore[no-any-return]


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
