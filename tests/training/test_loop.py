import json

import pytest
import torch
from torch import nn

from training import loop
from training.loop import DamagedCheckpoint, WarmupStableDecaySchedule, load_checkpoint, train

SCHEDULE = WarmupStableDecaySchedule(steps=12, rate=1e-2, warmup=3)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))


def losses(learner, until=None):
    def of(step):
        if step == until:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(10, (16,), generator=generator)
        loss = nn.functional.cross_entropy(learner(tokens), (tokens + 1) % 10)
        yield loss, {"loss": loss.item()}

    return of


def weights(learner):
    return [parameter.detach().clone() for parameter in learner.parameters()]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    uninterrupted, halved, resumed = model(), model(), model()
    train(tmp_path / "a", uninterrupted, losses(uninterrupted), SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", halved, losses(halved, until=7), SCHEDULE)
    train(tmp_path / "b", resumed, losses(resumed), SCHEDULE)
    for one, other in zip(weights(uninterrupted), weights(resumed), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_training_reduces_the_loss_and_writes_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    learner = model()
    train(tmp_path, learner, losses(learner), WarmupStableDecaySchedule(steps=200, rate=3e-2, embeddings=3e-2))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(4, 201, 4))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_snapshots_are_taken_at_their_interval_and_can_end_the_run(tmp_path):
    learner = model()
    seen: list[int] = []

    def snapshot(step):
        seen.append(step)
        return step == 6

    train(tmp_path, learner, losses(learner), SCHEDULE, snapshot=snapshot, snapshot_every=3)
    assert seen == [3, 6]
    assert load_checkpoint(tmp_path / "state.pt")["step"] == 6


def test_the_rate_rises_then_stays_constant_then_falls():
    schedule = WarmupStableDecaySchedule(steps=100, rate=1.0, embeddings=0.5, warmup=10)
    rates = [schedule.rates_at(step) for step in range(100)]
    assert [matrix for matrix, _ in rates[:10]] == pytest.approx([k / 10 for k in range(1, 11)])
    assert all(rate == (1.0, 0.5) for rate in rates[10:61])
    assert rates[80] == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    learner = model()
    train(tmp_path, learner, losses(learner), SCHEDULE)
    state = tmp_path / "state.pt"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt is damaged or half-written"):
        train(tmp_path, learner, losses(learner), SCHEDULE)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DamagedCheckpoint, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    learner = model()
    train(tmp_path, learner, losses(learner), SCHEDULE)
    with pytest.raises(DamagedCheckpoint, match="another schedule"):
        train(tmp_path, learner, losses(learner), WarmupStableDecaySchedule(steps=13, rate=1e-2))
    other = nn.Linear(3, 3)
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint of this model"):
        train(tmp_path, other, losses(other), SCHEDULE)
