import random
from typing import Any

from deployments.serving.busy_time import BusyTime, ServicePart


def test_busy_times_equal_a_count_in_small_time_steps(monkeypatch):
    """The clock is simulated, and the expected times are counted in another way."""
    now = 0.0
    monkeypatch.setattr("deployments.serving.busy_time.time.perf_counter", lambda: now)
    rng = random.Random(4)
    busy_time = BusyTime()
    expected = {"drafter": 0.0, "verifier": 0.0, "both": 0.0}
    at_work: list[tuple[ServicePart, Any]] = []
    parts: list[ServicePart] = ["drafter", "verifier"]
    for _ in range(500):
        passed = rng.random()
        busy = {part for part, _ in at_work}
        for busy_part in busy:
            expected[busy_part] += passed
        expected["both"] += passed * (len(busy) == 2)
        now += passed
        if at_work and rng.random() < 0.5:
            _, work = at_work.pop(rng.randrange(len(at_work)))
            work.__exit__(None, None, None)
        else:
            part = rng.choice(parts)
            work = busy_time.track(part)
            work.__enter__()
            at_work.append((part, work))
    busy_time.update()
    for name, seconds in expected.items():
        assert abs(getattr(busy_time, f"{name}_s") - seconds) < 1e-9
    assert 0 < busy_time.both_s < min(busy_time.drafter_s, busy_time.verifier_s)
