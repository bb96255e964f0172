"""Deploys the application on a real Ray with two simulated GPUs."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve

from parse.demo import DEMO_DRAFT, DEMO_TARGET
from tests.deployments.service.service_client import ServiceClient, free_port
from tests.deployments.service.spans import Spans

RAYS_PORTS = range(10002, 20000)  # the ports of Ray's workers
TRACED = {"exporter_import_path": "deployments.observability.tracing:otlp", "sampling_ratio": 1.0}
EXPORT_TIMEOUT_S = 1  # for spans
SMALL = {"num_threads": 1, "kv_cache_memory_bytes": 256 * 2**20, "max_model_len": 1024}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("ray")


@dataclass(frozen=True)
class Cluster:
    address: str
    logs: Path  # the logs of Ray Serve
    metrics: str  # host:port where Ray exports metrics


@pytest.fixture(scope="session")
def spans() -> Iterator[Spans]:
    with Spans.collected() as spans:
        yield spans


@pytest.fixture(scope="session")
def cluster(spans: Spans) -> Iterator[Cluster]:
    environment = {  # it has no effect until a deployment sets tracing_config
        "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
        "OTEL_EXPORTER_OTLP_TIMEOUT": str(EXPORT_TIMEOUT_S),
        "OTEL_BSP_SCHEDULE_DELAY": "500",  # milliseconds
    }
    os.environ |= environment
    port = free_port(outside=RAYS_PORTS)
    quiet: dict[str, Any] = dict(log_to_driver=False, namespace="serve", _metrics_export_port=port)
    context: Any = ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=True, **quiet)
    info = context.address_info
    yield Cluster(info["gcs_address"], Path(info["session_dir"]) / "logs" / "serve", f"127.0.0.1:{port}")
    serve.shutdown()
    ray.shutdown()
    for name in environment:
        del os.environ[name]


class Deployed:
    """Deploys configurations on the same cluster, one after the other.

    A configuration that is already deployed stays.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self.port = free_port()
        self._config: dict[str, Any] = {}

    def deploy(
        self,
        deployments: Sequence[dict[str, Any]] = (),
        *,
        traced: bool = False,
        http_options: Mapping[str, str] | None = None,
        **args: Any,
    ) -> subprocess.CompletedProcess[str]:
        args = {"target": {"model": DEMO_TARGET, **SMALL}, "draft": {"model": DEMO_DRAFT, **SMALL}} | args
        application = {"name": "parse", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
        config = {
            "proxy_location": "HeadOnly",  # the proxies of two nodes on one machine would need the same port
            "http_options": {"host": "127.0.0.1", "port": self.port, **(http_options or {})},
            "applications": [application | {"deployments": list(deployments)}],
            "tracing_config": TRACED | {"enabled": traced},
        }
        path = self._folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [
            sys.executable,
            "-m",
            "deployments",
            str(path),
            "--address",
            self._cluster.address,
            "--timeout",
            "240",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    def clear(self) -> None:
        if self._config:
            serve.delete("parse")
        self._config = {}

    def shut_down(self) -> None:
        """Stops Ray Serve, which reads `http_options` only when it starts."""
        serve.shutdown()
        self._config = {}

    def service(self, deployments: Sequence[dict[str, Any]] = (), **args: Any) -> ServiceClient:
        config = {"deployments": deployments, **args}
        if config != self._config:
            result = self.deploy(deployments, **args)
            assert result.returncode == 0, result.stdout + result.stderr
            self._config = config
        return ServiceClient(f"http://127.0.0.1:{self.port}")


@pytest.fixture(scope="session")
def deployed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(cluster, tmp_path_factory.mktemp("deployed"))


@pytest.fixture
def service(deployed: Deployed) -> Iterator[ServiceClient]:
    """A service with one replica of each deployment, which is idle."""
    service = deployed.service()
    yield service
    asyncio.run(service.wait_until_idle())
