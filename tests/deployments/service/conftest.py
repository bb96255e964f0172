"""A real Ray with two pretended GPUs, and the application deployed on it as its users deploy it."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve

from parse.local import DEMO_DRAFT, DEMO_TARGET
from tests.deployments.service.asking import Service, free_port

SMALL = {"threads": 1, "memory_mb": 256, "max_context": 1024}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("ray")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    quiet: dict[str, Any] = dict(log_to_driver=False, namespace="serve")
    context: Any = ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=True, **quiet)
    yield context.address_info["gcs_address"]
    serve.shutdown()
    ray.shutdown()


class Deployed:
    """Deploys one after the other on the same cluster; what is deployed already stays."""

    def __init__(self, cluster: str, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self._port = free_port()
        self._config: dict[str, Any] = {}

    def deploy(self, deployments: Sequence[dict[str, Any]] = (), **args: Any) -> subprocess.CompletedProcess[str]:
        args = {"target": {"model": DEMO_TARGET, **SMALL}, "draft": {"model": DEMO_DRAFT, **SMALL}} | args
        application = {"name": "parse", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
        config = {
            "http_options": {"host": "127.0.0.1", "port": self._port},
            "applications": [application | {"deployments": list(deployments)}],
        }
        path = self._folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "deployments", str(path), "--address", self._cluster, "--timeout", "120"]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

    def clear(self) -> None:
        if self._config:
            serve.delete("parse")
        self._config = {}

    def service(self, deployments: Sequence[dict[str, Any]] = (), **args: Any) -> Service:
        wanted = {"deployments": deployments, **args}
        if wanted != self._config:
            told = self.deploy(deployments, **args)
            assert told.returncode == 0, told.stdout + told.stderr
            self._config = wanted
        return Service(f"http://127.0.0.1:{self._port}")


@pytest.fixture(scope="session")
def deployed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(cluster, tmp_path_factory.mktemp("deployed"))


@pytest.fixture
def service(deployed: Deployed) -> Iterator[Service]:
    """One replica of each, at rest."""
    service = deployed.service()
    yield service
    asyncio.run(service.comes_to_rest())
