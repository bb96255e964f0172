"""Checks each RayService against KubeRay's own definition.

rayservice.json.gz is the unchanged schema of ray.io/v1 in the CRD of KubeRay 1.7.0. It was made in a checkout of
github.com/ray-project/kuberay at v1.7.0, by

    python -c 'import gzip, json, yaml
    crd = yaml.safe_load(open("helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml"))
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    open("rayservice.json.gz", "wb").write(gzip.compress(json.dumps(schema).encode(), mtime=0))'
"""

import copy
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from deployments.__main__ import PROXY_ENVIRONMENT, THROUGHPUT_ENVIRONMENT
from deployments.config import PROJECT_ROOT
from tests.cluster.test_configs import CLUSTER, RAY_SERVICES

SCHEMA = Path(__file__).with_name("rayservice.json.gz")


def strict(schema: Any) -> Any:
    """Returns a strict schema, in which an unknown key is an error.

    Kubernetes itself drops keys that the schema does not list.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if (
        result.get("type") == "object"
        and "properties" in result
        and not result.get("x-kubernetes-preserve-unknown-fields")
    ):
        result.setdefault("additionalProperties", False)
    return result


@pytest.fixture(scope="module")
def check() -> Draft202012Validator:
    schema = strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(params=RAY_SERVICES)
def service(request) -> Any:
    return yaml.safe_load((CLUSTER / request.param).read_text())


@pytest.fixture
def cluster(service) -> Any:
    return service["spec"]["rayClusterConfig"]


def serve_config(service):
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def settings_of_the_api(service):
    return serve_config(service)["applications"][0]["args"]["api"]


def groups(cluster):
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(cluster):
    return [group["template"]["spec"] for group in groups(cluster)]


def test_the_file_is_a_valid_rayservice(service, check):
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert [error.message for error in check.iter_errors(service)] == []


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all mappings whose keys the schema defines."""
    free = {"metadata", "rayStartParams", "requests", "limits", "nodeSelector"}
    if isinstance(part, dict):
        if not free & set(path):
            yield path
        for key, value in part.items():
            yield from places(value, (*path, key))
    elif isinstance(part, list):
        for place, value in enumerate(part):
            yield from places(value, (*path, place))


def test_an_unknown_key_is_rejected_at_every_place(service, check):
    paths = [path for path in places(service) if path]
    assert len(paths) > 30
    for path in paths:
        changed = copy.deepcopy(service)  # YAML's anchors share mappings, so they are copied
        changed = json.loads(json.dumps(changed))
        part = changed
        for step in path:
            part = part[step]
        part["surely-unknown"] = 1
        assert list(check.iter_errors(changed)), path


def test_a_value_of_the_wrong_type_is_rejected(service, check):
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "two"
    assert list(check.iter_errors(service))


# These rules are checked by KubeRay, and are not in its schema.


def test_groups_set_valid_numbers_of_replicas(cluster):
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_kuberay_accepts_the_name_and_the_strategy(service):
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", service["metadata"]["name"])
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "None")


# These values must agree with each other.


def test_the_version_of_ray_is_the_pinned_one(cluster):
    (pinned,) = re.findall(r"^ray==(.+)$", (PROJECT_ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned


def test_all_pods_run_one_image_and_kuberay_sets_their_commands(cluster):
    containers = [container for pod in pods(cluster) for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert not any(container.keys() & {"command", "args"} for container in containers)


def resources_of_pods(cluster) -> list[dict[str, float]]:
    """Returns what Ray sees in each pod of the workers."""
    available = []
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"num_gpus": float(limits["nvidia.com/gpu"]), "num_cpus": float(limits["cpu"])}
        # KubeRay passes the value to a shell, so it is JSON in quotes.
        custom = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        available += [resources | custom for _ in range(group["replicas"])]
    return available


def requests_of_replicas(service) -> list[dict[str, float]]:
    deployments = serve_config(service)["applications"][0]["deployments"]
    requests = []
    for deployment in deployments:
        options = dict(deployment["ray_actor_options"])
        requests += [options | options.pop("resources", {})] * deployment["num_replicas"]
    return requests


def all_fit(requests, pods) -> bool:
    """Returns whether all replicas start, wherever Ray places each of them."""
    if not requests:
        return True
    request, *others = requests
    possible = [pod for pod in pods if all(pod.get(name, 0) >= amount for name, amount in request.items())]
    for pod in possible:
        left = [dict(other) for other in pods if other is not pod]
        left.append({name: amount - request.get(name, 0) for name, amount in pod.items()})
        if not all_fit(others, left):
            return False
    return bool(possible)


def test_all_replicas_fit_and_none_is_on_the_head(service, cluster):
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    requests = requests_of_replicas(service)
    assert all(request["num_cpus"] > 0 for request in requests)
    for order in itertools.permutations(requests):
        assert all_fit(order, resources_of_pods(cluster))


def test_the_port_is_that_of_serve(service, cluster):
    options = serve_config(service)["http_options"]
    assert options["host"] == "0.0.0.0"
    for pod in pods(cluster):
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports["serve"] == options["port"] == 8000  # where KubeRay looks


def test_the_environment_is_that_of_make_serve(cluster):
    for pod in pods(cluster):
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        assert (THROUGHPUT_ENVIRONMENT | PROXY_ENVIRONMENT).items() <= env.items()


def test_pods_with_routers_get_the_keys_from_a_secret(service, cluster):
    variable = settings_of_the_api(service)["api_keys_env"]
    for group in cluster["workerGroupSpecs"]:
        env = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env[variable]["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}
    assert cluster["authOptions"] == {"mode": "token"}


def test_a_stopped_pod_has_time_to_finish_its_requests(service, cluster):
    request_timeout_s = settings_of_the_api(service)["request_timeout_s"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > request_timeout_s
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        script, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (PROJECT_ROOT / script.removeprefix("/app/")).stat().st_mode & 0o111  # the file is executable
        assert (
            request_timeout_s < int(seconds) <= pod["terminationGracePeriodSeconds"] - 30
        )  # the time until the script starts


def test_every_container_has_health_checks_and_few_privileges(cluster):
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"] and container["readinessProbe"]["httpGet"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_mounted_volumes_exist(cluster):
    for pod in pods(cluster):
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
