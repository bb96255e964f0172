"""Tests the messages while the service starts, and the end of the wait."""

import os
import re
import socket
import stat

import pytest
import ray
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from deployments import __main__ as command
from deployments import launch
from deployments.app import assemble, build
from deployments.config import PROJECT_ROOT, AppSettings
from deployments.launch import (
    DeploymentProgress,
    LaunchError,
    check_port,
    find_missing_capacity,
    find_occupied_resource,
    read_config,
    wait_until_ready,
)
from deployments.reference import list_deployments
from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_TARGET

GPU_EACH = [
    DeploymentProgress(
        "Verifier", target_replicas=1, placed_replicas=0, running_replicas=0, resources={"CPU": 0.3, "GPU": 1}
    ),
    DeploymentProgress(
        "Drafter", target_replicas=2, placed_replicas=1, running_replicas=0, resources={"CPU": 0.3, "GPU": 0.5}
    ),
]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([{"CPU": 4, "GPU": 2}], None),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], None),
        ([{"CPU": 4}], "a replica of Verifier needs 1 GPU, and no node has more than 0"),
        ([{"CPU": 4, "GPU": 1}], "all replicas together need 2 GPU, and there are 1"),
        ([{"CPU": 0.2, "GPU": 2}] * 9, "a replica of Verifier needs 0.3 CPU, and no node has more than 0.2"),
        ([{"CPU": 0.6, "GPU": 2}], "all replicas together need 0.9 CPU, and there are 0.6"),
    ],
)
def test_a_missing_resource_is_named(nodes, message):
    assert find_missing_capacity(GPU_EACH, nodes) == message


def test_an_occupied_resource_is_named():
    assert find_occupied_resource(GPU_EACH, {"CPU": 4, "GPU": 1}) is None
    assert (
        find_occupied_resource(GPU_EACH, {"CPU": 4, "GPU": 0.5})
        == "a replica of Verifier needs 1 GPU, and 0.5 are free"
    )


def details(status="DEPLOYING", message="", *, pid=None, state="STARTING"):
    replica = {"state": state} | ({} if pid is None else {"pid": pid})
    verifier = {
        "message": "its constructor failed" if message else "",
        "target_num_replicas": 1,
        "required_resources": {"CPU": 0.3, "GPU": 1.0},
        "replicas": [replica],
    }
    return {"applications": {"parse": {"status": status, "message": message, "deployments": {"Verifier": verifier}}}}


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose only node has no GPU."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4}}])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 4})
    monkeypatch.setattr(launch, "CAPACITY_CHECK_DELAY_S", 0.0)


def test_the_wait_prints_changes_and_ends_when_the_service_responds(capsys):
    responses = [
        {"applications": {}},
        details(),
        details(),
        details(pid=1),
        details(pid=1),
        details("RUNNING", pid=1, state="RUNNING"),
        details("RUNNING", pid=1, state="RUNNING"),
    ]
    answers = iter([False, True])
    wait_until_ready(lambda: responses.pop(0), lambda: next(answers), timeout_s=60, logs="/logs")
    printed = [line.split("s  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        "the application is being built",
        "Verifier waiting for resources",
        "Verifier loading",
        "Verifier ready",
    ]
    assert not responses


@pytest.mark.usefixtures("cluster")
def test_the_wait_ends_if_replicas_cannot_be_placed():
    with pytest.raises(LaunchError, match="needs 1 GPU, and no node has more than 0"):
        wait_until_ready(details, lambda: False, timeout_s=60, logs="/logs")


@pytest.mark.usefixtures("cluster")
def test_the_wait_goes_on_while_the_resources_are_held(monkeypatch, capsys):
    """The replica itself may hold them while its process starts, which takes long on a busy machine."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4, "GPU": 1}}])
    monkeypatch.setattr(launch, "PLACEMENT_HINT_DELAY_S", 0.0)
    responses = [details(), details(), details("RUNNING", pid=1, state="RUNNING")]
    wait_until_ready(lambda: responses.pop(0), lambda: True, timeout_s=60, logs="/logs")
    hint = "Verifier waiting for resources (a replica of Verifier needs 1 GPU, and 0 are free)"
    assert capsys.readouterr().out.splitlines()[1].endswith(f"  {hint}")
    with pytest.raises(LaunchError, match=re.escape(f"not ready after 0.1 s: {hint}; the logs are in /logs")):
        wait_until_ready(details, lambda: False, timeout_s=0.1, logs="/logs")


def test_the_wait_ends_with_the_reason_of_a_failure():
    with pytest.raises(LaunchError, match=r"cannot be deployed: wrong\nits constructor failed"):
        wait_until_ready(lambda: details("DEPLOY_FAILED", "wrong"), lambda: False, timeout_s=60, logs="/logs")


def test_the_wait_ends_at_the_timeout():
    with pytest.raises(LaunchError, match=r"not ready after 0 s: Verifier loading; the logs are in /logs$"):
        wait_until_ready(lambda: details(pid=1), lambda: False, timeout_s=0, logs="/logs")


def test_an_unhealthy_application_may_recover_and_is_reported_at_the_timeout():
    sick, well = details("UNHEALTHY", "a replica died", pid=1), details("RUNNING", pid=1, state="RUNNING")
    responses = [sick, sick, well]
    wait_until_ready(lambda: responses.pop(0), lambda: True, timeout_s=60, logs="/logs")
    with pytest.raises(LaunchError, match=r"not ready after 0 s: .*; the logs are in /logs; a replica died"):
        wait_until_ready(lambda: sick, lambda: True, timeout_s=0, logs="/logs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [", "while parsing"),
        ("[]", "valid dictionary"),
        ("applications: []", "one application must have the import_path deployments.app:build"),
        ("applications: [{name: a, import_path: 'x:y'}]", "one application must have the import_path"),
        ("applications: [{import_path: 'deployments.app:build', args: {}}]", "target: Field required"),
        (
            "applications: [{import_path: 'deployments.app:build', args: {target: {model: m, threats: 1}}}]",
            "yaml: target.threats is not known; did you mean num_threads?",
        ),
        (
            "applications: [{import_path: 'deployments.app:build', args: {target: {model: m, memory_mb: 1}}}]",
            "yaml: target.memory_mb was renamed to target.kv_cache_memory_bytes; multiply by 1048576 (MiB to bytes)",
        ),
        (
            "applications: [{import_path: 'deployments.app:build', deployments: [{name: Router, num_replica: 2}]}]",
            "Router.num_replica is not known; did you mean num_replicas?",
        ),
        (
            "applications: [{import_path: 'deployments.app:build', "
            "deployments: [{name: Drafter, ray_actor_options: {num_gpu: 1}}]}]",
            "Drafter.ray_actor_options.num_gpu is not known; did you mean num_gpus?",
        ),
        (
            "{http_options: {prot: 1}, applications: [{import_path: 'deployments.app:build', "
            "args: {target: {model: m}}}]}",
            "http_options.prot is not known; did you mean port?",
        ),
    ],
)
def test_a_configuration_is_checked_before_anything_starts(tmp_path, text, message):
    path = tmp_path / "serve_config.yaml"
    path.write_text(text)
    with pytest.raises(LaunchError, match=str(path)) as rejected:
        read_config(path)
    assert message in str(rejected.value)
    with pytest.raises(LaunchError, match="No such file"):
        read_config(tmp_path / "nowhere.yaml")


def test_serve_deploy_names_the_correct_key():
    """`serve deploy` calls the builder and shows only its error."""
    args = {"target": {"model": "m", "memory_mb": 512}, "api": {"max_answer": 4}}
    with pytest.raises(ValidationError) as rejected:
        call_user_app_builder_with_args_if_necessary(build, args)  # type: ignore[arg-type]
    printed = str(rejected.value)
    assert "target.memory_mb was renamed to target.kv_cache_memory_bytes; multiply by 1048576 (MiB to bytes)" in printed
    assert "api.max_answer is not known; did you mean max_answers?" in printed


def test_missing_folders_are_named(tmp_path):
    for model in (DEMO_TARGET, "models/demo-target", "Qwen/Qwen3-8B", "gpt2"):
        configs = (SpeculativeConfig(method="eagle3", model=model), SpeculativeConfig(method="ngram"))
        launch.check_model_folders("target", EngineSettings(model=model, speculative_configs=configs))
    for missing in (str(tmp_path / "none"), "./none", "~/none-of-mine", "models/none"):
        with pytest.raises(LaunchError, match=f"draft.model: the folder {re.escape(missing)} does not exist"):
            launch.check_model_folders("draft", EngineSettings(model=missing))
        with_configs = EngineSettings(
            model="gpt2", speculative_configs=(SpeculativeConfig(method="parallel", model=missing),)
        )
        with pytest.raises(
            LaunchError, match=rf"target.speculative_configs\[0\].model: the folder {re.escape(missing)} does not exist"
        ):
            launch.check_model_folders("target", with_configs)


def llm_config(**application):
    args = {"target": {"model": "m", "engine": {"kind": "remote", "deployment": "llm/LLMServer:m"}}}
    config = {"applications": [{"name": "parse", "import_path": "deployments.app:build", "args": args}]}
    return config | {"applications": [*config["applications"], *([application] if application else [])]}


@pytest.mark.parametrize(
    ("application", "message"),
    [
        ({}, "target.engine.deployment: a new Ray cluster has no application 'llm'"),
        ({"import_path": "ray.serve.llm:build_openai_app"}, "has no application 'llm'"),
        (
            {"name": "llm", "import_path": "ray.serve.llm:build_openai_app"},
            "the application 'llm': Ray Serve LLM is not installed",
        ),
    ],
)
def test_a_deployment_that_a_new_cluster_cannot_have_is_named(monkeypatch, application, message):
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    config = llm_config(**application)
    settings = AppSettings.model_validate(config["applications"][0]["args"])
    with pytest.raises(LaunchError, match=message):
        launch.check_llm_deployments(config, settings)


@pytest.mark.parametrize(
    "application",
    [
        {"name": "llm", "import_path": "ray.serve.llm:build_openai_app", "runtime_env": {"py_executable": "python"}},
        {"name": "llm", "import_path": "my_package:build"},
    ],
)
def test_a_deployment_of_another_application_of_the_file_is_waited_for(monkeypatch, application):
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    config = llm_config(**application)
    launch.check_llm_deployments(config, AppSettings.model_validate(config["applications"][0]["args"]))


def test_models_and_heads_of_the_project_are_found_from_any_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    configs = [{"method": "eagle3", "model": "models/demo-eagle3"}, {"method": "draft_model", "model": "some/model"}]
    target = {"model": "models/demo-target", "speculative_configs": [*configs, {"method": "ngram"}]}
    application, _ = assemble(AppSettings.model_validate({"target": target}))
    (settings,) = [
        deployment.init_args[0] for deployment in list_deployments(application) if deployment.name == "Verifier"
    ]
    assert settings.model == DEMO_TARGET
    assert [config.model for config in settings.speculative_configs] == [
        str(PROJECT_ROOT / "models" / "demo-eagle3"),
        "some/model",
        None,
    ]


def test_the_mode_off_needs_no_quotes(tmp_path):
    path = tmp_path / "serve_config.yaml"
    args = "{target: {model: m}, api: {modes: [off, full]}}"
    path.write_text(f"applications: [{{import_path: 'deployments.app:build', args: {args}}}]")
    assert read_config(path)[1].api.modes == ("off", "full")


def test_the_demo_is_served_only_on_this_machine():
    config, settings = read_config(command.DEFAULT_CONFIG)
    assert config["http_options"]["host"] == "127.0.0.1" and settings.model_name == "demo-target"


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} of 127.0.0.1 is not available"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_ray_requires_a_token_of_this_project(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # restored after the test
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setattr(command, "TOKEN_FILE", tmp_path / "deep" / "token")
    monkeypatch.setattr(command, "RAY_DEFAULT_TOKEN_FILE", tmp_path / "none")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    command.require_ray_token()
    token = command.TOKEN_FILE.read_text()
    assert len(token) == 64 and stat.S_IMODE(command.TOKEN_FILE.stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN_PATH"] == str(command.TOKEN_FILE)
    monkeypatch.delenv("RAY_AUTH_MODE")
    command.require_ray_token()
    assert command.TOKEN_FILE.read_text() == token


def test_an_existing_choice_about_tokens_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "TOKEN_FILE", tmp_path / "token")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    command.require_ray_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled" and not command.TOKEN_FILE.exists()
