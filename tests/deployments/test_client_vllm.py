"""The tests of the API with the official client again, while a real vLLM runs the target."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from bench.vllm_server import VLLMServer
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.engine_config import RemoteEngineConfig
from parse.pair import Pair
from tests.deployments.conftest import MODEL, settings
from tests.deployments.live import LocalBackend, served
from tests.deployments.test_client import *  # noqa: F403  # pytest collects the imported tests with the fixtures below

# The first test waits for the installation of vLLM.
pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def pair(vllm: VLLMServer) -> Iterator[Pair]:
    if vllm.process.poll() is not None:  # another test has killed it
        vllm.restart()
    engine = RemoteEngineConfig(kind="remote", url=vllm.url)
    with Pair(EngineSettings(model=DEMO_TARGET, max_model_len=1024, engine=engine), settings(DEMO_DRAFT)) as pair:
        yield pair


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[OpenAI]:
    with (
        served(create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client
