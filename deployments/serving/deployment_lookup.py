"""Finds the deployment that the settings of an engine name, in another application of the Ray cluster."""

import time
from collections.abc import Iterable, Mapping

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview

from deployments.serving.llm_deployment import DeploymentAddress
from parse.engine_config import RemoteEngineConfig

POLL_INTERVAL_S = 1.0
CALLABLE = ("HEALTHY", "UPSCALING", "DOWNSCALING")  # a deployment that is scaled to zero starts when it is called


def find_deployment(config: RemoteEngineConfig) -> DeploymentAddress | None:
    """Returns where the deployment is, or None if it is still being deployed.

    Raises ValueError, in one line, if it does not exist or has failed.
    """
    application, deployment = config.deployment_path
    if not is_callable(application, deployment, serve.status().applications):
        return None
    return DeploymentAddress(application, deployment, stall_timeout_s=config.stall_timeout_s)


def wait_for_deployment(config: RemoteEngineConfig) -> DeploymentAddress:
    """Returns where the deployment is, as soon as it can be called.

    Raises ValueError, in one line, if it cannot be called within `retry_timeout_s`.
    """
    give_up_at = time.monotonic() + config.retry_timeout_s
    while (address := find_deployment(config)) is None:
        if time.monotonic() > give_up_at:
            waited = f"after {config.retry_timeout_s:g} s"
            raise ValueError(f"engine.deployment: {config.deployment} is still being deployed {waited}")
        time.sleep(POLL_INTERVAL_S)
    return address


def is_callable(application: str, deployment: str, applications: Mapping[str, ApplicationStatusOverview]) -> bool:
    """Returns whether calls can be sent to the deployment, or False if it is still being deployed.

    Raises ValueError, in one line, if it does not exist or has failed.
    """
    if application not in applications:
        raise ValueError(
            f"engine.deployment: this Ray cluster has no application {application!r}; it has {_list(applications)}"
        )
    overview = applications[application]
    if deployment in overview.deployments:
        return _serves(f"{application}/{deployment}", overview.deployments[deployment])
    if overview.status == ApplicationStatus.DEPLOY_FAILED:
        raise ValueError(f"engine.deployment: {application} could not be deployed: {_one_line(overview.message)}")
    if overview.status in (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING):
        return False
    raise ValueError(
        f"engine.deployment: the application {application!r} has no deployment {deployment!r}; "
        f"it has {_list(overview.deployments)}"
    )


def _serves(path: str, overview: DeploymentStatusOverview) -> bool:
    num_running = sum(count for state, count in overview.replica_states.items() if state == "RUNNING")
    if num_running or overview.status in CALLABLE:
        return True
    if overview.status == "DEPLOY_FAILED":
        raise ValueError(f"engine.deployment: {path} could not be deployed: {_one_line(overview.message)}")
    return False


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
