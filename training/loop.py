"""The training loop: optimizers, a schedule, checkpoints that survive an interruption, and a log for plots.

A stage is a pure function of its seed and step number, so resuming needs no state but weights, moments and the step.
"""

import json
import math
import pickle
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

SAVE_EVERY_S = 90.0  # at most this much work is lost by an interruption
LOG_EVERY = 25

Losses = Callable[[int], Iterator[tuple[Tensor, dict[str, float]]]]
"""Yields the micro-batches of a step: the share of the loss of each, and the metrics to log."""


class DamagedCheckpoint(RuntimeError):
    """A file is damaged, or is the checkpoint of another model or schedule."""


class LearningRateSchedule(Protocol):
    """A frozen dataclass. A checkpoint is continued only with an equal schedule."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int: ...

    def rates_at(self, step: int) -> tuple[float, ...]:
        """Returns the learning rate of each optimizer."""
        ...


@dataclass(frozen=True)
class WarmupStableDecaySchedule:
    """Linear warm-up, a plateau, and a linear decay to zero."""

    steps: int
    rate: float  # rate of the matrices of the layers
    embeddings: float = 1.5e-3  # rate of the other parameters
    warmup: int = 50
    decay: float = 0.4  # share of the steps in which the rate decays

    def rates_at(self, step: int) -> tuple[float, float]:
        up = min(1.0, (step + 1) / self.warmup)
        down = min(1.0, (1 - step / self.steps) / self.decay)
        return self.rate * up * down, self.embeddings * up * down


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up and cosine decay to zero, for a single optimizer."""

    steps: int
    rate: float
    warmup: int = 50

    def rates_at(self, step: int) -> tuple[float, ...]:
        up = min(1.0, (step + 1) / self.warmup)
        return (self.rate * up * 0.5 * (1 + math.cos(math.pi * step / self.steps)),)


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and small heads."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings and min(p.shape) > 1]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in trainable if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)]


def train(
    folder: Path,
    model: nn.Module,
    losses: Losses,
    schedule: LearningRateSchedule,
    *,
    build_optimizers: Callable[[nn.Module], list[Optimizer]] = muon_and_adamw,
    snapshot: Callable[[int], bool] | None = None,
    snapshot_every: int = 0,
) -> None:
    """Trains `model` in place, and continues from the checkpoint in `folder` if there is one.

    `snapshot` is called every `snapshot_every` steps. It may save the model, and it ends the run by returning True.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, log = folder / "state.pt", folder / "log.jsonl"
    optimizers = build_optimizers(model)
    step, previous_s = _resume(state, model, optimizers, schedule)
    started = saved_at = time.monotonic()
    metric_values: dict[str, list[float]] = defaultdict(list)
    with log.open("a") as out, tqdm(total=schedule.steps, initial=step, desc=folder.name, unit="step") as bar:
        while step < schedule.steps:
            for optimizer, rate in zip(optimizers, schedule.rates_at(step), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate
            for loss, metrics in losses(step):
                loss.backward()
                for name, value in metrics.items():
                    if not math.isnan(value):  # a share of no cases
                        metric_values[name].append(value)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == schedule.steps:
                means = {name: round(sum(values) / len(values), 5) for name, values in metric_values.items()}
                seconds = round(previous_s + time.monotonic() - started, 1)
                out.write(json.dumps({"step": step, "seconds": seconds, **means}) + "\n")
                out.flush()
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
                metric_values.clear()
            enough = snapshot is not None and step % snapshot_every == 0 and snapshot(step)
            if enough or step == schedule.steps or time.monotonic() - saved_at > SAVE_EVERY_S:
                _save(state, model, optimizers, schedule, step, previous_s + time.monotonic() - started)
                saved_at = time.monotonic()
            if enough:
                return


def _resume(
    path: Path, model: nn.Module, optimizers: list[Optimizer], schedule: LearningRateSchedule
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = load_checkpoint(path)
    if state.get("schedule") != asdict(schedule):
        raise DamagedCheckpoint(
            f"{path} was made with another schedule, {state.get('schedule')}, not {asdict(schedule)}: "
            "remove its folder to start over"
        )
    try:
        model.load_state_dict(state["model"])
        for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
    except (KeyError, RuntimeError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of this model: {error}") from error
    return int(state["step"]), float(state["seconds"])


def _save(
    path: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    schedule: LearningRateSchedule,
    step: int,
    seconds: float,
) -> None:
    """Writes to a temporary file and renames it, so that a checkpoint is never half-written."""
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "schedule": asdict(schedule),
            "step": step,
            "seconds": seconds,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        },
        temporary,
    )
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(f"{path} is damaged or half-written: {error}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state
