import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from deployments.__main__ import set_ray_environment
from training.tokenizer import build_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
set_ray_environment()  # before anybody imports Ray
torch.set_num_threads(1)  # pytest runs one worker per core


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no type hints
    """Runs each test on whichever worker is free, and all tests that need a real Ray on one, with one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/deployments/service/") else nodeid


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
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()
