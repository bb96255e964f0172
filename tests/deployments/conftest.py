"""Provides one demo pair and one server for all tests of the HTTP API."""

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_MODELS, DEMO_TARGET
from parse.pair import Pair
from tests.deployments.live import LocalBackend, served

MODEL = "demo-target"


SPECULATIVE_CONFIGS = (
    SpeculativeConfig(method="parallel", model=str(DEMO_MODELS / "demo-parallel")),
    SpeculativeConfig(method="ngram"),
)


def settings(path: str, *configs: SpeculativeConfig) -> EngineSettings:
    return EngineSettings(
        model=path, num_threads=1, max_model_len=1024, kv_cache_memory_bytes=512 * 2**20, speculative_configs=configs
    )


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    with Pair(settings(DEMO_TARGET, *SPECULATIVE_CONFIGS), settings(DEMO_DRAFT)) as pair:
        yield pair


@pytest.fixture(scope="session")
def address(pair: Pair) -> Iterator[str]:
    with served(create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[OpenAI]:
    """The official OpenAI client."""
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def raw(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as raw:
        yield raw
