"""Training objectives: losses over a batch of examples.

The draft model learns next tokens only. So does the base of the target, which then learns to keep every token readable
at its top layer. The layers on top of the base learn to detect errors and to verify, with the help of small heads that
are dropped afterwards:

- *odd*, for every token: does it differ from the base's prediction one position before? To compare two tokens is the
  hardest to learn, so it is trained densely, with many words replaced (`ExampleBuilder.build_scrambled`);
- *slip*, for every token: is it the first wrong one? Most odd tokens are only worded differently;
- *astray*, for every token: is the text up to here correct?
- at the top layer, the answer word after each verification suffix.
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
from training.examples import IGNORE_INDEX, TrainingBatch

LossAndMetrics = tuple[Tensor, dict[str, float]]

SLIP_LAYER_SHARE, ASTRAY_LAYER_SHARE = 0.7, 0.85  # heights in the stack, as shares of its layers
RECALL_WEIGHT, FLAG_WEIGHT, VERIFICATION_WEIGHT = 0.3, 0.3, 0.5
ODD_LAYER_OFFSET = 2  # layers above the base
SLIP_RARITY = 5.0  # one token in a hundred is a slip


class NextTokenObjective(nn.Module):
    """Next tokens only."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainingBatch) -> LossAndMetrics:
        hidden = _hidden_states(self.model, batch)
        return self.next_token_loss(hidden[-1], batch)

    def next_token_loss(self, top: Tensor, batch: TrainingBatch) -> LossAndMetrics:
        trainable = batch.next_token != IGNORE_INDEX
        logits = _logits(self.model, top[trainable])
        labels = batch.next_token[trainable]
        loss = cross_entropy(logits, labels)
        return loss, {"write": loss.item(), "write_hits": _share(logits.argmax(-1) == labels)}


class RecallObjective(NextTokenObjective):
    """Next tokens, while the last token stays readable at the top layer, because verification needs it there."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.recall = nn.Linear(model.config.hidden_size, model.config.vocab_size)

    def forward(self, batch: TrainingBatch) -> LossAndMetrics:
        hidden = _hidden_states(self.model, batch)
        loss, metrics = self.next_token_loss(hidden[-1], batch)
        in_answer = batch.astray != IGNORE_INDEX
        recalled, labels = self.recall(hidden[-1][in_answer].float()), batch.tokens[in_answer]
        metrics["recall_hits"] = _share(recalled.argmax(-1) == labels)
        return loss + RECALL_WEIGHT * cross_entropy(recalled, labels), metrics


class VerificationObjective(NextTokenObjective):
    """Next tokens and verification answers."""

    def __init__(self, model: PreTrainedModel, suffix: VerificationSuffix) -> None:
        super().__init__(model)
        self.verification_suffix = suffix

    def forward(self, batch: TrainingBatch) -> LossAndMetrics:
        top = _hidden_states(self.model, batch)[-1]
        next_token_loss, metrics = self.next_token_loss(top, batch)
        verification_loss, verification_metrics = self.verification_loss(top, batch)
        return next_token_loss + VERIFICATION_WEIGHT * verification_loss, metrics | verification_metrics

    def verification_loss(self, top: Tensor, batch: TrainingBatch) -> LossAndMetrics:
        if not len(batch.verification_labels):
            return top.new_zeros(()), {}
        logits = _logits(self.model, top[batch.verification_nodes[:, 0], batch.verification_nodes[:, 1]])
        loss = cross_entropy(logits, batch.verification_labels)
        is_correct = batch.verification_labels == self.verification_suffix.correct_token_ids[0]
        accepted = (
            logits[:, self.verification_suffix.correct_token_ids[0]]
            > logits[:, self.verification_suffix.incorrect_token_ids[0]]
        )
        return loss, {
            "verdict": loss.item(),
            "right_passed": _share(accepted[is_correct]),
            "wrong_failed": _share(~accepted[~is_correct]),
        }


class ErrorDetectionObjective(VerificationObjective):
    """Next tokens, first wrong tokens, and verification answers."""

    def __init__(self, model: PreTrainedModel, suffix: VerificationSuffix, base_layers: int) -> None:
        super().__init__(model, suffix)
        self.base_layers = base_layers
        self.base_norm = deepcopy(cast(nn.Module, model.base_model.norm)).requires_grad_(False)
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        self.slip_layer, self.astray_layer = (round(layers * share) for share in (SLIP_LAYER_SHARE, ASTRAY_LAYER_SHARE))
        self.odd, self.slip, self.astray = nn.Linear(width, 1), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, batch: TrainingBatch) -> LossAndMetrics:
        hidden = _hidden_states(self.model, batch)
        next_token_loss, metrics = self.next_token_loss(hidden[-1], batch)
        odd, odd_metrics = self._odd(hidden, batch)
        slip, slip_scores = self._flag(self.slip, hidden[self.slip_layer], batch.slip, SLIP_RARITY)
        astray, astray_scores = self._flag(self.astray, hidden[self.astray_layer], batch.astray, 1.0)
        verification_loss, verification_metrics = self.verification_loss(hidden[-1], batch)
        metrics |= verification_metrics | odd_metrics
        metrics |= {
            "slip_found": _share(slip_scores[batch.slip == 1] > 0),
            "slip_cried": _share(slip_scores[batch.slip == 0] > 0),
        }
        metrics |= {
            "astray_hits": _share(
                (astray_scores > 0)[batch.astray != IGNORE_INDEX] == (batch.astray == 1)[batch.astray != IGNORE_INDEX]
            )
        }
        return next_token_loss + FLAG_WEIGHT * (odd + slip + astray) + VERIFICATION_WEIGHT * verification_loss, metrics

    def _odd(self, hidden: tuple[Tensor, ...], batch: TrainingBatch) -> LossAndMetrics:
        """Returns the loss of detecting tokens that differ from the base's prediction one position before."""
        with torch.no_grad():
            predicted = _logits(self.model, self.base_norm(hidden[self.base_layers][:, :-1])).argmax(-1)
        in_answer = batch.astray[:, 1:] != IGNORE_INDEX
        odd = (predicted != batch.tokens[:, 1:])[in_answer]
        scores = self.odd(hidden[self.base_layers + ODD_LAYER_OFFSET][:, 1:][in_answer].float()).squeeze(-1)
        loss = binary_cross_entropy_with_logits(scores, odd.float())
        return loss, {"odd_found": _share(scores[odd] > 0), "odd_cried": _share(scores[~odd] > 0)}

    @staticmethod
    def _flag(head: nn.Module, hidden: Tensor, labels: Tensor, rarity: float) -> tuple[Tensor, Tensor]:
        scores = head(hidden.float()).squeeze(-1)
        labeled = labels != IGNORE_INDEX
        weight = scores.new_tensor(rarity)
        return binary_cross_entropy_with_logits(scores[labeled], labels[labeled].float(), pos_weight=weight), scores


def _hidden_states(model: PreTrainedModel, batch: TrainingBatch) -> tuple[Tensor, ...]:
    """Returns the hidden states of every layer. Those of the last layer are normalized, as the lm_head expects them."""
    assert model.config._attn_implementation == TREE_ATTENTION
    visible = torch.zeros(batch.visible.shape, dtype=torch.bfloat16, device=batch.tokens.device)
    visible.masked_fill_(~batch.visible, -1e30)
    device = batch.tokens.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16_is_faster(device)):
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
def bfloat16_is_faster(device: str) -> bool:
    """Returns whether bfloat16 is faster: always on a GPU, and on a CPU only if it has instructions for it."""
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
