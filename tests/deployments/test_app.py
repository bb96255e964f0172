"""Tests what the application is built with."""

import pytest
import ray

from deployments import app
from deployments.config import AppSettings
from parse.config import EngineSettings

HEAD = {"Alive": True, "Resources": {"CPU": 2.0}}


@pytest.mark.parametrize(
    ("device", "nodes", "is_checked"),
    [
        ("cpu", [HEAD], True),
        ("cpu", [HEAD, {"Alive": False, "Resources": {"CPU": 2.0}}], True),
        ("cpu", [HEAD, HEAD], False),
        ("cpu", [{"Alive": True, "Resources": {}}], False),  # the models will run on nodes that are not there yet
        ("auto", [HEAD], False),  # a node with GPUs may join
        ("cuda", [HEAD], False),
    ],
)
def test_the_memory_is_checked_if_both_models_run_on_this_machine(monkeypatch, device, nodes, is_checked):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(app, "machine_bytes", lambda: 1234)
    model = EngineSettings(model="some/model", device=device)
    for draft in (None, model):
        settings = AppSettings(target=model, draft=draft)
        assert app._shared_memory_bytes(settings) == (1234 if is_checked else None)
