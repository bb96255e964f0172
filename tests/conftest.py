import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from bench.vllm_server import ServerOptions, VLLMServer, start
from deployments.__main__ import set_ray_environment
from parse.demo import DEMO_TARGET
from parse.engines.vllm.installation import NEWEST, VLLMUnavailable
from training.tokenizer import build_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray gives its workers a low priority. Beside the other tests of a small machine they would then hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")
set_ray_environment()  # before anybody imports Ray
torch.set_num_threads(1)  # pytest runs one worker per core


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no type hints
    """Runs each test on whichever worker is free.

    All tests that need a real Ray share a worker and a cluster, and all that need a real vLLM share a server.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/deployments/service/"):
            return "ray"
        return "vllm" if nodeid.partition("::")[0].endswith("_vllm.py") else nodeid


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs slow tests first, so that no worker ends with one while the others have nothing left to do."""
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Lets a skipped test fail in continuous integration, where every tool is installed. There is no GPU."""
    report = yield
    if report.skipped and os.environ.get("CI") and not item.get_closest_marker("cuda"):
        report.outcome, report.longrepr = "failed", f"skipped although CI is set: {report.longrepr}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Resets the number of threads, which the code under test may have changed."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vllm() -> Iterator[VLLMServer]:
    """A real vLLM that serves the demo target. The environment variable VLLM_VERSION selects another release."""
    version = os.environ.get("VLLM_VERSION", NEWEST)
    options = ServerOptions(DEMO_TARGET, version=version, block_size=32, more=("--enable-prompt-tokens-details",))
    try:
        server = start(options)
    except VLLMUnavailable as error:
        pytest.skip(f"vLLM cannot run here: {error}")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    try:
        from tests.deployments.browser import MISSING, browsing
    except ImportError as missing:
        pytest.skip(f"no browser: {missing.name} is not installed")
    if MISSING:
        pytest.skip(f"no browser: {MISSING}")
    with browsing() as browser:
        yield browser
