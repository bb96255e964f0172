"""From a configuration to a service that answers: Ray started, the application deployed, its progress told."""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import ray
import yaml
from pydantic import BaseModel, ValidationError
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from deployments.config import HOUSE, AppSettings, located
from parse.config import EngineSettings

BUILDER = "deployments.app:build"
EXAMPLE = (
    "Kim has the record with 27. In turn: first Uma 73, second Max 52, third Jack 74, fourth Quinn 34, fifth Dan 38, "
    "sixth Ben 80, seventh Sam 26. Who has the record now?"
)
SETTLED_S = 5.0  # until the wanted replicas are known
PLACED_S = 60.0  # a replica with a place may take that long to have a process
ROUNDING = 1e-6
TELL_AGAIN_S = 15.0
OWN_CLUSTER: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}


class NotServing(RuntimeError):
    """Why the wait is over."""


@dataclass(frozen=True)
class Deployment:
    """What the wait looks at."""

    name: str
    wanted: int  # replicas
    placed: int  # have a process
    running: int  # and are ready
    needs: Mapping[str, float]  # each of them

    @property
    def line(self) -> str:
        if self.running == self.wanted:
            return f"{self.name} ready"
        return f"{self.name} {'loading' if self.placed == self.wanted else 'waiting for a place'}"


def read_config(path: Path) -> tuple[dict[str, Any], AppSettings]:
    """Checked here, where its fault can be told in a line: all of it, and the settings of our application."""
    try:
        config = yaml.safe_load(path.read_text())
        ServeDeploySchema.model_validate(config)
        ours = [app for app in config["applications"] if app["import_path"] == BUILDER]
        if len(ours) != 1:
            raise NotServing(f"{path}: one application must have the import_path {BUILDER}")
        for place, given, known in _parts(config, ours[0]):
            if unknown := sorted(given.keys() - known.model_fields.keys()):
                raise NotServing(f"{path}: {place}{unknown[0]}: is not known")
        return config, AppSettings.model_validate(ours[0].get("args", {}))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise NotServing(f"{path}: {faults}") from error
    except (OSError, yaml.YAMLError) as error:
        raise NotServing(f"{path}: {error}") from error


def _parts(
    config: Mapping[str, Any], ours: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], type[BaseModel]]]:
    """With the keys each may have: Ray Serve passes over what it does not know."""
    yield "", config, ServeDeploySchema
    yield "http_options.", config.get("http_options") or {}, HTTPOptionsSchema
    yield "applications.", ours, ServeApplicationSchema
    for deployment in ours.get("deployments") or []:
        name = f"{deployment['name']}."
        yield name, deployment, DeploymentSchema
        yield f"{name}ray_actor_options.", deployment.get("ray_actor_options") or {}, RayActorOptionsSchema


def check_folders(field: str, settings: EngineSettings) -> None:
    check_folder(f"{field}.model", settings.model)
    for way in settings.speculation:
        if way.head:
            check_folder(f"{field}.speculation.head", way.head)


def check_folder(field: str, model: str) -> None:
    """What is meant as a folder should be one: else it would be looked for on the hub, for minutes."""
    meant = model.startswith((".", "/", "~")) or ((HOUSE / model).parent != HOUSE and (HOUSE / model).parent.is_dir())
    if meant and not Path(located(model)).is_dir():
        raise NotServing(f"{field}: there is no folder {model}")


def check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise NotServing(f"port {port} of {host} cannot be had ({error.strerror}): see http_options") from error


def _environment() -> str:
    """What other commands need to reach our Ray."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    return "".join(f"{name}={os.environ[name]} " for name in names if name in os.environ)


def deployments_of(details: Mapping[str, Any]) -> list[Deployment]:
    found = []
    for application in details["applications"].values():
        for name, deployment in application["deployments"].items():
            replicas = deployment["replicas"]
            found.append(
                Deployment(
                    name=name,
                    wanted=deployment["target_num_replicas"],
                    placed=sum(replica.get("pid") is not None for replica in replicas),
                    running=sum(replica["state"] == "RUNNING" for replica in replicas),
                    needs=deployment["required_resources"] or {},
                )
            )
    return found


def lacking(parts: Sequence[Deployment], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What no waiting will bring: of each node, its resources."""
    for resource in sorted({resource for part in parts for resource in part.needs}):
        there = [node.get(resource, 0.0) for node in nodes]
        for part in parts:
            if part.needs.get(resource, 0.0) > max(there, default=0.0):
                most = f"no node has more than {max(there, default=0.0):g}"
                return f"a replica of {part.name} needs {part.needs[resource]:g} {resource}, and {most}"
        wanted = sum(part.wanted * part.needs.get(resource, 0.0) for part in parts)
        if wanted > sum(there) + ROUNDING:
            return f"all replicas together need {wanted:g} {resource}, and there are {sum(there):g}"
    return None


def taken(waiting: Sequence[Deployment], free: Mapping[str, float]) -> str | None:
    """What others have to give back first."""
    for part in waiting:
        for resource, amount in part.needs.items():
            if amount > free.get(resource, 0.0):
                return f"a replica of {part.name} needs {amount:g} {resource}, and {free.get(resource, 0.0):g} are free"
    return None


def wait_until_ready(
    details: Callable[[], Mapping[str, Any]],
    answers: Callable[[], bool],
    *,
    timeout_s: float,
    logs: str,
) -> None:
    """Tells what changes; ends with a reason if it cannot come to anything."""
    started = told_at = time.monotonic()
    told, unplaced_since = "", None
    while True:
        now = time.monotonic()
        found = details()
        for application in found["applications"].values():
            if application["status"] == "DEPLOY_FAILED":  # from UNHEALTHY it may recover
                raise NotServing(f"the application cannot be deployed: {_reasons(application)}")
        parts = deployments_of(found)
        if all(a["status"] == "RUNNING" for a in found["applications"].values()) and parts and answers():
            return
        line = ", ".join(part.line for part in parts) or "the application is being built"
        if line != told or now - told_at > TELL_AGAIN_S:
            tell(f"{now - started:4.0f} s  {line}")
            told, told_at = line, now
        unplaced = [part for part in parts if part.placed < part.wanted]
        unplaced_since = (unplaced_since or now) if unplaced else None
        if unplaced_since is not None and (lack := _lack(parts, unplaced, now - unplaced_since)):
            raise NotServing(f"the cluster cannot place all replicas: {lack}")
        if now - started > timeout_s:
            reasons = " ".join(filter(None, map(_reasons, found["applications"].values())))
            raise NotServing(f"not ready after {timeout_s:g} s: {line}; the logs are in {logs}; {reasons}".strip("; "))
        time.sleep(0.25)


def _reasons(application: Mapping[str, Any]) -> str:
    reasons = [application["message"], *(found["message"] for found in application["deployments"].values())]
    return "\n".join(filter(None, reasons)).strip()


def _lack(parts: Sequence[Deployment], unplaced: Sequence[Deployment], seconds: float) -> str | None:
    """What those that have been without a process so long may be waiting for."""
    if seconds < SETTLED_S:
        return None
    lack = lacking(parts, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    return taken(unplaced, ray.available_resources()) if lack is None and seconds > PLACED_S else lack


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (HTTPError, URLError, TimeoutError, ConnectionError):
        return False


def greeting(url: str, model: str, dashboard: str, logs: str, *, keys: bool) -> str:
    content = EXAMPLE if model == "demo-target" else "What is the capital of France?"
    key = " -H 'Authorization: Bearer <one of your keys>'" if keys else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0})
    return f"""
Ready.

  API        {url}/v1
  to try     {url}/
  documents  {url}/docs
  figures    {url}/metrics, and with dashboards: make monitoring
  Ray        {dashboard}
  logs       {logs}
  status     {_environment()}{Path(sys.executable).parent}/serve status --address {dashboard}

curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'
"""


def serve(path: Path, *, address: str | None, timeout_s: float) -> None:
    config, settings = read_config(path)
    http = HTTPOptionsSchema.model_validate(config.get("http_options", {}))
    if address is None:
        check_port(http.host, http.port)
        check_folders("target", settings.target)
        if settings.draft:
            check_folders("draft", settings.draft)
        tell("starting Ray")
    cluster: Any = ray.init(
        address=address or "local",
        namespace="serve",
        log_to_driver=False,
        logging_level=logging.WARNING,
        **({} if address else OWN_CLUSTER),
    )
    dashboard = f"http://{cluster.dashboard_url}"
    logs = f"{cluster.address_info['session_dir']}/logs/serve"
    client = ServeSubmissionClient(dashboard)
    tell(f"deploying {path}")
    client.deploy_applications(config)
    scheme, here = "https" if http.ssl_certfile else "http", http.host in ("0.0.0.0", "::")
    url = f"{scheme}://{'127.0.0.1' if here else http.host}:{http.port}"
    wait_until_ready(client.get_serve_details, lambda: is_ready(url), timeout_s=timeout_s, logs=logs)
    keys = bool(settings.api.api_keys_file or os.environ.get(settings.api.api_keys_env))
    tell(greeting(url, settings.model_name, dashboard, logs, keys=keys))


def tell(text: str) -> None:
    print(text, flush=True)
