"""Tests the health checks and the preparation of replicas."""

import asyncio
import subprocess
import sys
from dataclasses import replace

import pytest

from deployments.serving.replica import ModelReplica
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT
from parse.engines.native import hang_detector
from parse.requests import GenerateRequest
from parse.types import SamplingParams


@pytest.fixture
def hosted(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hosted = ModelReplica(
        EngineSettings(model=DEMO_DRAFT, num_threads=1, kv_cache_memory_bytes=64 * 2**20, max_model_len=512)
    )
    yield hosted
    hosted.engine.shutdown()


def test_a_new_replica_has_run_all_kinds_of_requests_and_caches_nothing(hosted):
    asyncio.run(hosted.warm_up())
    stats = hosted.engine.stats
    assert stats.num_steps > 10 and not stats.num_running
    assert asyncio.run(hosted.engine.prefill(range(64))) == 0
    description = asyncio.run(hosted.describe())
    assert (description.device, description.visible_gpus, description.max_model_len) == ("cpu", "", 512)


def test_an_engine_without_steps_is_unhealthy_unless_it_has_no_work(hosted, monkeypatch):
    monkeypatch.setattr(hang_detector, "MAX_STEP_DURATION_S", 0.0)
    hosted.check_health()

    async def held_up():
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        stream = hosted.engine.generate(GenerateRequest(prompt_token_ids=(1, 2, 3), sampling_params=params))
        await anext(stream)
        monkeypatch.setattr(type(hosted.engine), "stats", property(lambda _: frozen))
        hosted.check_health()  # the check has just seen a step
        with pytest.raises(RuntimeError, match="no step for 0 s"):
            await hosted.alive()
        await stream.aclose()

    frozen = hosted.engine.stats
    frozen = replace(frozen, num_running=1, num_steps=7)
    asyncio.run(held_up())


def test_a_stopped_engine_is_unhealthy(hosted):
    hosted.engine.shutdown()
    with pytest.raises(RuntimeError, match="thread has ended"):
        hosted.check_health()


@pytest.mark.slow
def test_a_router_does_not_import_the_native_engine():
    """It would take seconds at each start, and about 80 MB."""
    unwanted = {"parse.engines.native.engine", "torch._dynamo"}
    script = f"import sys, deployments.serving.router; print({unwanted} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
