"""The remote engine over a stand-in for Ray Serve LLM: the same tests as with vLLM, and what is different."""

import asyncio
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from ray.exceptions import RaySystemError

from deployments.serving.llm_deployment import DeploymentAddress, LLMDeployment
from parse.config import EngineSettings
from parse.demo import DEMO_TARGET
from parse.engine_config import RemoteEngineConfig
from parse.engines.loader import load_engine
from parse.engines.native_loader import load_native_engine
from parse.errors import RequestError, ServerError
from tests.deployments.serving.llm_server import LLMServer, LocalHandle
from tests.parse.engines.remote import test_remote_engine
from tests.parse.engines.remote.fake_vllm import FakeVLLM
from tests.parse.engines.remote.test_remote_engine import (  # noqa: F401  # pytest collects them with the fixtures below
    GREEDY,
    PROMPTS,
    answer_of,
    collect,
    generation,
    run,
    test_a_closed_generator_ends_the_call_on_the_server,
    test_a_server_without_chosen_tokens_never_overestimates_p_correct,
    test_it_generates_what_the_native_engine_generates,
    test_log_probabilities_are_those_of_the_native_engine,
    test_log_probabilities_of_a_draft_are_those_of_the_native_engine,
    test_p_correct_is_that_of_the_native_engine,
    test_parameters_that_a_server_with_speculation_ignores_are_rejected,
    tokens_of,
)

PATH = "llm/LLMServer:demo"


class LocalAddress(DeploymentAddress):
    """An address of a deployment in this process."""

    def open(self):
        return LLMDeployment(self, HANDLES[self.deployment])


HANDLES: dict[str, Any] = {}


def remote(server, llm_config=None, **config):
    HANDLES["LLMServer:demo"] = LocalHandle(LLMServer(server.url, llm_config))
    engine = RemoteEngineConfig(kind="remote", deployment=PATH, **config)

    def find_deployment(config):
        application, deployment = config.deployment_path
        return LocalAddress(application, deployment, config.stall_timeout_s)

    return load_engine(EngineSettings(model=DEMO_TARGET, engine=engine), find_deployment)


@pytest.fixture(autouse=True)
def through_the_handle(monkeypatch):
    monkeypatch.setattr(test_remote_engine, "remote", remote)


@pytest.fixture(scope="module")
def native():
    engine = load_native_engine(EngineSettings(model=DEMO_TARGET, num_threads=1, kv_cache_memory_bytes=2**28))
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def module_server():
    server = FakeVLLM(DEMO_TARGET)
    yield server
    server.close()


@pytest.fixture
def server(module_server):
    yield module_server
    module_server.misbehave = lambda body: None
    module_server.has_speculation = False
    module_server.lacks = set()
    module_server.bodies.clear()


def llm_config(model_id="served", **engine_kwargs):
    source = SimpleNamespace(model_id=model_id, model_source=DEMO_TARGET)
    return SimpleNamespace(model_id=model_id, model_loading_config=source, engine_kwargs=engine_kwargs)


def test_it_is_reported_as_untested_with_what_it_lacks(server, caplog):
    with caplog.at_level(logging.WARNING):
        remote(server, RaySystemError(ImportError("no vLLM"))).shutdown()
    assert f"deployment {PATH}: no version of Ray Serve LLM was tested" in caplog.text
    assert "metrics of vLLM" in caplog.text and "its context length is not known" in caplog.text


def test_the_settings_of_the_deployment_are_used_if_they_can_be_read(server, caplog):
    with caplog.at_level(logging.WARNING):
        engine = remote(server, llm_config(max_model_len=300, block_size=32))
    capabilities = engine.capabilities()
    engine.shutdown()
    assert (capabilities.max_model_len, capabilities.block_size) == (300, 32)
    assert "context length is not known" not in caplog.text


@pytest.mark.parametrize("config", [None, llm_config()])
def test_another_model_is_named(server, config):
    with pytest.raises(ValueError, match=f"deployment {PATH}: .*serves 'served', and not 'mine'"):
        remote(server, config, model_name="mine")
    engine = remote(server, config, model_name="served")
    assert engine.name == "served"
    engine.shutdown()


def test_calls_of_vllm_that_do_not_work_are_detected(server):
    server.misbehave = lambda body: (
        web.json_response({"error": {"message": "no"}}, status=400)
        if body.get("echo") or body.get("logprobs") in (0, 20)
        else None
    )
    with pytest.raises(ValueError, match="no"):  # the models of two servers could not be told apart
        remote(server)
    server.misbehave = lambda body: (
        web.json_response({"error": {"message": "no"}}, status=400) if body.get("echo") else None
    )
    engine = remote(server)
    assert "exact" not in engine.capabilities().modes and "full" in engine.capabilities().modes
    engine.shutdown()


def test_an_engine_that_returns_no_token_ids_is_named(server):
    """SGLang, which Ray Serve LLM can run too, ignores the field that requests them."""
    server.lacks = {"return_token_ids"}
    with pytest.raises(ValueError, match="only the vLLM engine of Ray Serve LLM"):
        remote(server)


def test_a_draft_does_not_change_greedy_output(server, native):
    """Its tokens are compared with the most likely ones in the echo of the prompt."""
    answer = answer_of(native)
    (deltas,) = run(remote(server), generation(draft_token_ids=[*answer[:11], answer[11] + 1, *answer[12:]]))
    assert tokens_of(deltas) == answer[:30] and sum(delta.num_accepted for delta in deltas) == 11


def test_a_stream_whose_replica_is_lost_continues_after_its_last_token(server, native):
    lengths = iter([5, 3, 0])
    engine = remote(server)
    server.misbehave = lambda body: next(lengths, None) if body["max_tokens"] > 1 else None
    (deltas,) = run(engine, generation())
    assert tokens_of(deltas) == answer_of(native)[:30] and next(lengths, "used") == "used"


def test_an_error_ends_only_its_own_request(server, native):
    prompts = PROMPTS[:2]
    engine, expected = remote(server), [answer_of(native, prompt)[:30] for prompt in prompts]

    def misbehave(body):
        is_first = body["prompt"][: len(PROMPTS[0])] == PROMPTS[0]
        return web.json_response({"error": {"message": "too long"}}, status=400) if is_first else None

    server.misbehave = misbehave

    async def all_of_them():
        calls = (collect(engine.generate(generation(prompt))) for prompt in prompts)
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = asyncio.run(all_of_them())
    engine.shutdown()
    assert isinstance(first, RequestError) and "too long" in str(first)
    assert [tokens_of(deltas) for deltas in others] == expected[1:]


def test_an_error_that_does_not_end_is_reported_with_the_words_of_the_server(server):
    engine = remote(server)
    server.misbehave = lambda body: web.json_response({"error": {"message": "out of order"}}, status=500)
    with pytest.raises(ServerError, match="out of order"):
        run(engine, generation())


def test_every_call_has_an_id_of_its_own(server):
    """vLLM rejects a request with the id of one that runs."""
    params = replace(GREEDY, max_tokens=2)
    run(remote(server), *(generation(prompt, sampling_params=params) for prompt in PROMPTS))
    ids = [body["request_id"] for body in server.bodies]
    assert len(set(ids)) == len(ids) > len(PROMPTS)


def test_a_library_without_ray_cannot_call_a_deployment():
    engine = RemoteEngineConfig(kind="remote", deployment=PATH)
    with pytest.raises(ValueError, match=r"engine\.deployment: it can be called only by the service"):
        load_engine(EngineSettings(model=DEMO_TARGET, engine=engine))
