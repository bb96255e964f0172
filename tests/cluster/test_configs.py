"""Checks all configurations against the schemas of Ray Serve and of the settings."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from deployments.__main__ import THROUGHPUT_ENVIRONMENT
from deployments.app import assemble
from deployments.config import PROJECT_ROOT, AppSettings
from deployments.launch import BUILDER_IMPORT_PATH, LaunchError, read_config
from deployments.reference import list_deployments

CLUSTER = PROJECT_ROOT / "cluster"
RAY_SERVICES = {"rayservice.yaml": "serve_gpu.yaml", "rayservice_vllm.yaml": "serve_vllm.yaml"}
"""Each file for KubeRay, with the configuration that it contains."""
CONFIGS = [*sorted(PROJECT_ROOT.glob("serve_*.yaml")), *sorted(CLUSTER.glob("serve_*.yaml"))]


def embedded(name: str) -> str:
    return str(yaml.safe_load((CLUSTER / name).read_text())["spec"]["serveConfigV2"])


TEXTS = {path.name: path.read_text() for path in CONFIGS} | {name: embedded(name) for name in RAY_SERVICES}


@pytest.fixture(params=TEXTS, ids=str)
def config(request) -> Any:
    return yaml.safe_load(TEXTS[request.param])


def application(config):
    (application_config,) = config["applications"]
    return application_config


def test_each_config_fits_the_schemas_of_serve_and_of_the_settings(config):
    ServeDeploySchema.model_validate(config)
    assert application(config)["import_path"] == BUILDER_IMPORT_PATH
    AppSettings.model_validate(application(config)["args"])


def test_no_config_has_a_key_that_serve_would_ignore(config):
    """Serve's own schema accepts unknown keys."""
    app = application(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert config["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    assert app.keys() <= ServeApplicationSchema.model_fields.keys()
    for deployment in app.get("deployments", []):
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
        assert deployment["ray_actor_options"].keys() <= RayActorOptionsSchema.model_fields.keys()


def test_each_config_names_only_deployments_that_are_built(config):
    app = application(config)
    built = {deployment.name for deployment in list_deployments(assemble(AppSettings.model_validate(app["args"]))[0])}
    assert built == {"Router", "Verifier", "Drafter"}
    assert {deployment["name"] for deployment in app.get("deployments", [])} <= built


def test_each_deployment_sets_its_cores_and_a_model_on_gpus_its_gpus(config):
    """A key that is missing in `ray_actor_options` means a whole core, or no GPU."""
    app = application(config)
    for deployment in app.get("deployments", []):
        options = deployment["ray_actor_options"]
        assert "num_cpus" in options
        model = {"Verifier": "target", "Drafter": "draft"}.get(deployment["name"])
        if model and app["args"][model].get("device") == "cuda":
            assert options["num_gpus"] >= 1


def test_without_a_draft_there_is_no_drafter():
    application, _ = assemble(AppSettings.model_validate({"target": {"model": "models/demo-target"}}))
    built = list_deployments(application)
    assert {deployment.name for deployment in built} == {"Router", "Verifier"}


def test_the_container_serves_the_same_as_make_serve_but_to_the_network():
    here, container = (yaml.safe_load(TEXTS[name]) for name in ("serve_config.yaml", "serve_container.yaml"))
    assert here["http_options"].pop("host") == "127.0.0.1" and container["http_options"].pop("host") == "0.0.0.0"
    assert here == container


@pytest.mark.parametrize(("name", "contained"), RAY_SERVICES.items())
def test_a_rayservice_contains_a_config_for_gpus(name, contained):
    config = yaml.safe_load(TEXTS[name])
    for deployment in application(config)["deployments"]:
        deployment["ray_actor_options"].pop("resources", None)  # the pods for its replicas
    assert config == yaml.safe_load(TEXTS[contained])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "serve_vllm_fp8.yaml",
            {
                "target": {"model": "Qwen/Qwen3-32B-FP8", "num_gpus": 2, "tensor_parallel_size": 2},
                "draft": {"model": "Qwen/Qwen3-4B-FP8"},
            },
        ),
        (
            "serve_vllm_eagle3.yaml",
            {
                "target": {
                    "speculative_config": {
                        "method": "eagle3",
                        "model": "RedHatAI/Qwen3-32B-speculator.eagle3",
                        "num_speculative_tokens": 3,
                    }
                }
            },
        ),
    ],
)
def test_the_variants_for_vllm_change_nothing_else(name, changes):
    expected = yaml.safe_load(TEXTS["serve_vllm.yaml"])
    app = application(expected)
    by_name = {deployment["name"]: deployment["ray_actor_options"] for deployment in app["deployments"]}
    deployment_of = {"target": "Verifier", "draft": "Drafter"}
    for model, values in changes.items():
        for key, value in values.items():
            if key == "model":
                app["args"][model][key] = value
            elif key == "num_gpus":
                by_name[deployment_of[model]][key] = value
            else:
                app["args"][model]["engine"]["engine_args"][key] = value
    assert yaml.safe_load(TEXTS[name]) == expected


def test_the_page_on_deploying_names_all_files_and_variables():
    page = (PROJECT_ROOT / "docs" / "deploying.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for deployment in yaml.safe_load(example)["deployments"]:
        assert DeploymentSchema.model_validate(deployment).name in ("Router", "Verifier", "Drafter")
    assert [name for name in THROUGHPUT_ENVIRONMENT if name not in page] == []
    unnamed = {"Dockerfile.dockerignore", "__init__.py", "__pycache__"}
    assert set(re.findall(r"cluster/([\w.]+)", page)) >= {path.name for path in CLUSTER.iterdir()} - unnamed


@pytest.mark.parametrize("page", ["api.md", "configuration.md", "deploying.md", "monitoring.md"])
def test_links_of_the_pages_have_targets(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", (PROJECT_ROOT / "docs" / page).read_text()):
        name, _, part = link.partition("#")
        target = PROJECT_ROOT / "docs" / (name or page)
        assert target.exists(), link
        if part:
            heads = [line.lstrip("# ").lower() for line in target.read_text().splitlines() if line.startswith("#")]
            assert part in [re.sub(r"[^a-z0-9 -]", "", head).replace(" ", "-") for head in heads], link


@pytest.mark.parametrize("num_gpus", [0, 1, 8])
def test_replicas_have_as_many_gpus_as_their_vllm_needs(num_gpus, tmp_path):
    config = yaml.safe_load(TEXTS["serve_vllm.yaml"])
    (verifier,) = (d for d in application(config)["deployments"] if d["name"] == "Verifier")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    read_config(path)
    verifier["ray_actor_options"]["num_gpus"] = num_gpus
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(LaunchError, match=f"Verifier.ray_actor_options.num_gpus is {num_gpus}, .* need 4"):
        read_config(path)


@pytest.mark.parametrize("name", [path.name for path in CLUSTER.glob("*.yaml") if path.name != "serve_container.yaml"])
def test_untried_files_say_that_they_are_untried(name):
    assert (CLUSTER / name).read_text().startswith("# NOT TRIED ON HARDWARE")


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("args",), {"targett": {}}),
        (("args", "target"), {"max_contexts": 1}),
        (("args", "draft"), {"memory": 1}),
        (("args", "verification"), {"strude": 3}),
        (("args", "verification"), {"full": 1.5}),
        (("args", "api"), {"key": "secret"}),
        (("deployments", 0), {"num_replicas": -1}),
        (("deployments", 0), {"autoscaling_config": {"min_replicas": 1}}),  # num_replicas is set too
    ],
)
def test_wrong_keys_and_values_are_rejected(place, wrong, tmp_path: Path):
    config = yaml.safe_load(TEXTS["serve_gpu.yaml"])
    part = application(config)
    for step in place:
        part = part[step]
    part |= wrong
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises((LaunchError, ValidationError)):
        read_config(path)
