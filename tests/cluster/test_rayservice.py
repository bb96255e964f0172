"""The RayService against KubeRay's own definition of one.

rayservice.json.gz is the schema of ray.io/v1 in KubeRay 1.7.0's CRD, as it is. Made, in a checkout of
github.com/ray-project/kuberay at v1.7.0, by

    python -c 'import gzip, json, yaml
    crd = yaml.safe_load(open("helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml"))
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    open("rayservice.json.gz", "wb").write(gzip.compress(json.dumps(schema).encode(), mtime=0))'
"""

import copy
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from deployments.__main__ import THROUGHPUT_ENVIRONMENT
from deployments.config import PROJECT_ROOT
from tests.cluster.test_configs import RAY_SERVICE

SCHEMA = Path(__file__).with_name("rayservice.json.gz")


def strict(schema: Any) -> Any:
    """Kubernetes drops what a schema does not list; here it is an error."""
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


@pytest.fixture
def service() -> Any:
    return yaml.safe_load(RAY_SERVICE.read_text())


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


def test_it_is_a_ray_service(service, check):
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert [error.message for error in check.iter_errors(service)] == []


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all mappings in it whose keys are given names, not names of ours."""
    free = {"metadata", "rayStartParams", "requests", "limits", "nodeSelector"}
    if isinstance(part, dict):
        if not free & set(path):
            yield path
        for key, value in part.items():
            yield from places(value, (*path, key))
    elif isinstance(part, list):
        for place, value in enumerate(part):
            yield from places(value, (*path, place))


def test_an_unknown_key_is_refused_wherever_it_stands(service, check):
    paths = [path for path in places(service) if path]
    assert len(paths) > 30
    for path in paths:
        changed = copy.deepcopy(service)  # with no mapping shared, as it is after YAML's anchors
        changed = json.loads(json.dumps(changed))
        part = changed
        for step in path:
            part = part[step]
        part["surely-unknown"] = 1
        assert list(check.iter_errors(changed)), path


def test_a_value_of_the_wrong_kind_is_refused(service, check):
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "two"
    assert list(check.iter_errors(service))


# What KubeRay checks beyond its schema.


def test_groups_say_how_many_they_may_be(cluster):
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_its_name_and_strategy_are_such_as_kuberay_takes(service):
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", service["metadata"]["name"])
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "None")


# What must agree.


def test_ray_is_the_one_that_is_pinned(cluster):
    (pinned,) = re.findall(r"^ray==(.+)$", (PROJECT_ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned


def test_all_pods_run_one_image_whose_commands_kuberay_makes(cluster):
    containers = [container for pod in pods(cluster) for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert not any(container.keys() & {"command", "args"} for container in containers)


def test_all_replicas_fit_and_none_is_on_the_head(service, cluster):
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    deployments = serve_config(service)["applications"][0]["deployments"]
    assert all(deployment["ray_actor_options"]["num_cpus"] > 0 for deployment in deployments)
    for resource, name in (("num_gpus", "nvidia.com/gpu"), ("num_cpus", "cpu")):
        requested = sum(d["num_replicas"] * d["ray_actor_options"].get(resource, 0) for d in deployments)
        available = sum(
            group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"][name])
            for group in cluster["workerGroupSpecs"]
        )
        assert requested <= available, name


def test_its_port_is_the_one_that_serve_listens_on(service, cluster):
    options = serve_config(service)["http_options"]
    assert options["host"] == "0.0.0.0"
    for pod in pods(cluster):
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports["serve"] == options["port"] == 8000  # where KubeRay looks


def test_serve_is_set_up_as_make_serve_does_it(cluster):
    for pod in pods(cluster):
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        assert THROUGHPUT_ENVIRONMENT.items() <= env.items()


def test_keys_come_from_a_secret_to_where_routers_run(service, cluster):
    variable = settings_of_the_api(service)["api_keys_env"]
    for group in cluster["workerGroupSpecs"]:
        env = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env[variable]["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}
    assert cluster["authOptions"] == {"mode": "token"}


def test_what_is_stopped_has_the_time_to_end_what_it_began(service, cluster):
    request_timeout_s = settings_of_the_api(service)["request_timeout_s"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > request_timeout_s
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        script, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (PROJECT_ROOT / script.removeprefix("/app/")).stat().st_mode & 0o111  # may be executed
        assert request_timeout_s < int(seconds) <= pod["terminationGracePeriodSeconds"] - 30  # and be found late


def test_every_container_is_probed_and_may_do_little(cluster):
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"] and container["readinessProbe"]["httpGet"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_volumes_that_are_mounted_are_there(cluster):
    for pod in pods(cluster):
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
