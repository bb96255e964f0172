"""Which servers and commands follow from a configuration."""

import atexit
import copy
import shlex
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import yaml

from bench.load import main as load_main
from bench.reproduce.environment import shareable_config
from bench.reproduce.hardware import Machine, UnsupportedConfig, enlarged_parallel_sizes
from bench.reproduce.plan import ReproduceOptions, ReproducePlan, build_plan
from bench.reproduce.steps import RequestCount, choose_counts, measurement_steps, num_cells, pilot_steps
from bench.reproduce.tasks import QualityOptions, demo_tasks, file_tasks, generated_tasks
from bench.workload import load_problems
from deployments.config import AppSettings
from deployments.launch import read_config
from parse.demo import DEMO_EAGLE3, DEMO_TARGET
from tests.test_docs import ROOT
from training.task import correct_answer, draw_problem

CPU, SIX_GPUS = Machine("core", 2), Machine("GPU", 64, ("H200",) * 6)
PYTHON = Path("/opt/vllm/bin/python")
DEMO, GPU_CONFIG = ROOT / "serve_vllm_demo.yaml", ROOT / "cluster" / "serve_vllm.yaml"


def plan_of(config: Path, machine: Machine, change: Any = None, **options: Any) -> ReproducePlan:
    document, _ = read_config(config)
    document = copy.deepcopy(document)
    application = document["applications"][0]
    if config == GPU_CONFIG:
        application["args"]["target"]["model"] = str(model_folder())
    if change:
        change(application)
    settings = AppSettings.model_validate(application["args"])
    chosen = ReproduceOptions(config, Path("out"), **options)
    tasks = demo_tasks(QualityOptions(limit=100))
    return build_plan(chosen, document, settings, machine=machine, python=PYTHON, tasks=tasks)


@cache
def model_folder() -> Path:
    """Returns a folder with the configuration of a model that is not the demo target, and has 4 attention heads."""
    folder = Path(mkdtemp(prefix="parse-serve-test-"))
    atexit.register(shutil.rmtree, folder)
    shutil.copy(Path(DEMO_TARGET) / "config.json", folder)
    return folder


def arguments(plan: ReproducePlan, name: str) -> dict[str, str]:
    (server,) = [server for server in plan.servers if server.name == name]
    flags = [part for part in server.command if part.startswith("--")]
    command = list(server.command)
    return {flag: command[command.index(flag) + 1] if flag != command[-1] else "" for flag in flags}


def units(plan: ReproducePlan) -> dict[str, int]:
    return {server.name: server.num_units for server in plan.servers}


def test_the_demo_is_compared_with_its_target_on_one_core_and_on_both():
    plan = plan_of(DEMO, CPU)
    assert units(plan) == {
        "vllm": 1,
        "vllm-all-cores": 2,
        "vllm-eagle3": 1,
        "vllm-eagle3-all-cores": 2,
        "vllm-ngram": 1,
        "vllm-ngram-all-cores": 2,
        "parse": 2,
        "parse-eagle3": 2,
        "vllm-repeated": 1,
    }
    threads = {server.name: server.environment.get("OMP_NUM_THREADS") for server in plan.servers}
    assert (threads["vllm"], threads["vllm-all-cores"]) == ("1", "2")
    first, *_, last = plan.servers
    assert last.command == first.command and last.environment == first.environment
    assert plan.omissions == ()


def test_a_baseline_has_the_arguments_of_the_target():
    plan = plan_of(DEMO, CPU)
    baseline = arguments(plan, "vllm")
    assert baseline["--dtype"] == "float32" and baseline["--block-size"] == "32" and "--enforce-eager" in baseline
    assert baseline["--max-model-len"] == "1024" and Path(baseline["--model"]).name == "demo-target"
    assert "--speculative-config" not in baseline
    assert DEMO_EAGLE3 in arguments(plan, "vllm-eagle3")["--speculative-config"]


def test_a_displayed_command_can_be_typed_and_hides_secrets():
    def change(application: dict[str, Any]) -> None:
        application["args"]["target"]["engine"]["environment"]["HF_TOKEN"] = "hf_secret"

    server = plan_of(DEMO, CPU, change).servers[0]
    words = shlex.split(server.shell_command)
    assert words[0] == "env" and words[-len(server.command) :] == list(server.command)
    assert "hf_secret" not in server.shell_command and server.environment["HF_TOKEN"] == "hf_secret"
    with_token = replace(server, command=(*server.command, "--hf-token", "hf_other"))
    assert "hf_other" not in with_token.shell_command and "--hf-token HIDDEN" in with_token.shell_command
    config = {"args": {"target": {"engine": {"environment": {"HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "1"}}}}}
    assert "hf_secret" not in shareable_config(config) and "OMP_NUM_THREADS: '1'" in shareable_config(config)


def test_on_gpus_the_baselines_use_as_many_as_the_target_and_as_parse():
    plan = plan_of(GPU_CONFIG, SIX_GPUS, eagle3="organization/head")
    assert units(plan) == {
        "vllm": 4,
        "vllm-all-gpus": 5,
        "vllm-eagle3": 4,
        "vllm-eagle3-all-gpus": 5,
        "vllm-ngram": 4,
        "vllm-ngram-all-gpus": 5,
        "parse": 5,
        "parse-eagle3": 5,
        "vllm-repeated": 4,
    }
    assert arguments(plan, "vllm")["--tensor-parallel-size"] == "4"
    enlarged = arguments(plan, "vllm-all-gpus")  # 5 does not divide the 4 attention heads of the model
    assert (enlarged["--tensor-parallel-size"], enlarged["--data-parallel-size"]) == ("1", "5")
    assert "OMP_NUM_THREADS" not in plan.servers[0].environment


def test_the_user_can_choose_the_arguments_on_all_gpus():
    plan = plan_of(GPU_CONFIG, SIX_GPUS, all_gpus_args={"pipeline_parallel_size": 5, "tensor_parallel_size": 1})
    enlarged = arguments(plan, "vllm-all-gpus")
    assert (enlarged["--tensor-parallel-size"], enlarged["--pipeline-parallel-size"]) == ("1", "5")
    assert arguments(plan, "vllm")["--tensor-parallel-size"] == "4"
    with pytest.raises(UnsupportedConfig, match="use 8 GPUs, and PARSE uses 5"):
        plan_of(GPU_CONFIG, SIX_GPUS, all_gpus_args={"data_parallel_size": 2})


def test_replicas_of_the_target_become_data_parallel():
    def change(application: dict[str, Any]) -> None:
        application["args"]["target"]["engine"]["engine_args"]["tensor_parallel_size"] = 2
        application["deployments"][1] |= {"num_replicas": 2, "ray_actor_options": {"num_gpus": 2}}

    plan = plan_of(GPU_CONFIG, SIX_GPUS, change)
    baseline = arguments(plan, "vllm")
    assert (baseline["--tensor-parallel-size"], baseline["--data-parallel-size"]) == ("2", "2")
    assert units(plan)["vllm"] == 4 and units(plan)["parse"] == 5


@pytest.mark.parametrize(
    ("engine_args", "num_gpus", "num_heads", "expected"),
    [
        ({}, 2, 32, {"tensor_parallel_size": 2}),
        ({"tensor_parallel_size": 4}, 8, 64, {"tensor_parallel_size": 8}),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 8, 64, {"tensor_parallel_size": 4}),
        # 5 and 3 divide no number of heads that is a power of two, so copies share the GPUs.
        ({"tensor_parallel_size": 4}, 5, 64, {"tensor_parallel_size": 1, "data_parallel_size": 5}),
        ({"tensor_parallel_size": 2}, 6, 32, {"tensor_parallel_size": 2, "data_parallel_size": 3}),
        ({"tensor_parallel_size": 4}, 6, 64, {"tensor_parallel_size": 2, "data_parallel_size": 3}),
        ({"tensor_parallel_size": 2}, 3, 40, {"tensor_parallel_size": 1, "data_parallel_size": 3}),
        ({"tensor_parallel_size": 4}, 5, 40, {"tensor_parallel_size": 5}),
        ({"pipeline_parallel_size": 2}, 3, 64, None),
    ],
)
def test_the_parallel_sizes_use_exactly_the_gpus(engine_args, num_gpus, num_heads, expected):
    assert enlarged_parallel_sizes(engine_args, num_gpus, num_heads) == expected


def test_a_missing_head_is_left_out_and_parse_is_composed_with_ngram():
    plan = plan_of(GPU_CONFIG, SIX_GPUS)
    assert "vllm-eagle3" not in units(plan) and "parse-ngram" in units(plan)
    assert ["no EAGLE-3 head was given" in omission.reason for omission in plan.omissions] == [True]
    plan = plan_of(DEMO, CPU, eagle3="models/no-such-head")
    assert [omission.reason for omission in plan.omissions] == ["there is no folder models/no-such-head"]
    assert "vllm-eagle3" not in units(plan)


def test_the_speculation_of_the_configuration_is_a_baseline_and_is_composed():
    own = {"method": "medusa", "model": "organization/medusa", "num_speculative_tokens": 5}

    def change(application: dict[str, Any]) -> None:
        application["args"]["target"]["engine"]["engine_args"]["speculative_config"] = own

    plan = plan_of(GPU_CONFIG, SIX_GPUS, change)
    assert "organization/medusa" in arguments(plan, "vllm-medusa")["--speculative-config"]
    assert "--speculative-config" not in arguments(plan, "vllm")
    composed, plain = (yaml.safe_load(plan.files[f"configs/{name}.yaml"]) for name in ("parse-medusa", "parse"))
    engine_args = [c["applications"][0]["args"]["target"]["engine"]["engine_args"] for c in (composed, plain)]
    assert engine_args[0]["speculative_config"] == own and "speculative_config" not in engine_args[1]


def test_the_variants_of_the_configuration_are_valid_and_change_only_what_the_report_says(tmp_path):
    def change(application: dict[str, Any]) -> None:
        application["args"]["api"] = {"api_keys_file": "keys", "modes": ["full"], "max_answers": 7}

    plan = plan_of(DEMO, CPU, change, port=8765)
    original, _ = read_config(DEMO)
    for name, content in plan.files.items():
        file = tmp_path / Path(name).name
        file.write_text(content)
        variant, settings = read_config(file)
        assert variant["http_options"] == {"host": "127.0.0.1", "port": 8765}
        assert settings.api.model_dump(exclude_defaults=True) == {"max_answers": 7} and settings.audit.share == 0
        assert settings.draft == AppSettings.model_validate(original["applications"][0]["args"]).draft
    assert plan.files.keys() == {"configs/parse.yaml", "configs/parse-eagle3.yaml"}
    assert any("at most 7 requests" in note for note in plan.notes)


def test_every_mode_except_auto_is_measured():
    (server,) = [server for server in plan_of(DEMO, CPU).servers if server.name == "parse"]
    assert server.modes[0] == "off" and set(server.modes) == {"off", "full", "rounds", "progressive", "exact"}
    assert server.contender("full") == "parse-full" and "api_keys_env" not in server.shell_command
    assert server.removed_variables == ("PARSE_API_KEYS",)


def unsupported(path: tuple[str, ...], value: Any) -> Any:
    def change(application: dict[str, Any]) -> None:
        *parents, name = path
        entry: Any = application
        for parent in parents:
            entry = entry[int(parent)] if isinstance(entry, list) else entry[parent]
        entry[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unsupported(("args", "target", "engine"), {"kind": "native"}), "target.engine.kind is native"),
        (unsupported(("args", "target", "engine"), {"kind": "remote", "url": "http://h:1"}), "the target must have"),
        (unsupported(("args", "draft", "engine"), {"kind": "remote", "url": "http://h:1"}), "draft.engine.kind is"),
        (unsupported(("args", "draft"), None), "draft is missing"),
        (unsupported(("deployments", "1", "num_replicas"), "auto"), "Verifier: the hardware must not change"),
        (unsupported(("deployments", "2", "num_replicas"), 3), "needs 7 GPUs, and this machine has 6"),
    ],
)
def test_what_is_not_supported_is_said(change, message):
    with pytest.raises(UnsupportedConfig, match=message):
        plan_of(GPU_CONFIG, SIX_GPUS, change)


# The commands


def test_all_servers_answer_the_same_problems_and_each_number_of_clients_others():
    plan = plan_of(DEMO, CPU, clients=(1, 8))
    counts = {1: RequestCount(8, 4, 9), 8: RequestCount(32, 2, 9)}
    steps = [step for server in plan.servers for step in measurement_steps(plan, server, counts)]
    workloads: dict[int | None, set[tuple[str, str, str]]] = {}
    for step in steps:
        if step.kind == "load":
            value = dict(zip(step.arguments, step.arguments[1:], strict=False))
            workloads.setdefault(step.clients, set()).add((value["--requests"], value["--rounds"], value["--seed"]))
    assert {clients: len(values) for clients, values in workloads.items()} == {1: 1, 8: 1}
    seeds = [seed for values in workloads.values() for _, _, seed in values]
    pilots = [dict(zip(step.arguments, step.arguments[1:], strict=False))["--seed"] for step in pilot_steps(plan)]
    assert len(set(seeds)) == 2 and not set(seeds) & set(pilots)
    assert len({step.id for step in [*steps, *pilot_steps(plan)]}) == len(steps) + 2


def test_the_number_of_requests_fills_the_time_but_is_at_least_one_per_client():
    counts = choose_counts((1, 8, 32, 128), {1: 0.8, 8: 4.0}, seconds_per_cell=10)
    # 8 requests, 40 requests, 40 requests at the rate of 8 clients, and one for each of 128 clients
    assert counts == {
        1: RequestCount(8, 4, 10),  # a round has 2.5 s, and may take four times as long
        8: RequestCount(40, 2, 20),
        32: RequestCount(40, 1, 40),
        128: RequestCount(128, 1, 40),
    }


def test_without_a_pilot_the_numbers_are_the_smallest_ones():
    assert choose_counts((1, 128), {}, 10) == {
        1: RequestCount(4, 2, 20),
        128: RequestCount(128, 1, 40),
    }


def test_cells_are_pairs_of_a_contender_and_a_number_of_clients():
    assert num_cells(plan_of(DEMO, CPU, clients=(1, 8))) == 2 * (6 + 5 + 5 + 1)


def test_problems_of_a_file_are_numbered_and_measured_with_the_same_result():
    plan = plan_of(DEMO, CPU)
    tasks = file_tasks(QualityOptions(50), Path("my_problems.jsonl"), r"#### (\d+)")
    plan = ReproducePlan(plan.servers, (1,), "core", plan.allocation, tasks)
    parse, composed = (server for server in plan.servers if server.kind == "parse")
    counts = {1: RequestCount(6, 3, 9)}
    load, quality = measurement_steps(plan, parse, counts)
    assert [step.kind for step in measurement_steps(plan, composed, counts)] == ["load"]
    assert "off,full,progressive,rounds" in quality.arguments
    assert "--distinct-prompts" in load.arguments and r"#### (\d+)" in load.arguments
    assert "my_problems.jsonl" in quality.arguments and r"#### (\d+)" in quality.arguments
    assert "50" in quality.arguments and "1024" in quality.arguments


@pytest.mark.parametrize("index", range(4))
def test_the_answer_of_a_generated_problem_is_the_last_number_of_the_solution(index, tmp_path):
    tasks = generated_tasks(QualityOptions(100), tmp_path)
    assert tasks.prompts is not None
    for name, content in tasks.files.items():
        (tmp_path / name).write_text(content)
    request = load_problems(tasks.prompts, tasks.result)[index]
    solution = correct_answer(draw_problem("bench", 0, index))
    number = "".join(filter(str.isdigit, solution.rpartition("\n")[2] or solution.splitlines()[-1]))
    assert request.is_correct is not None
    assert request.is_correct(f"{solution}\n**Answer:** {number}", True)
    assert not request.is_correct(f"{solution}\nAnswer: {int(number) + 1}", True)


def test_a_displayed_command_of_a_step_starts_a_program_that_accepts_its_arguments(monkeypatch, capsys):
    step = pilot_steps(plan_of(DEMO, CPU))[0]
    words = shlex.split(step.shell_command("http://127.0.0.1:9", Path("/nonexistent/x.json")))
    assert words[:3] == ["python", "-m", "bench.load"]
    monkeypatch.setattr("sys.argv", ["load", *words[3:]])
    with pytest.raises(SystemExit):  # the folder of the file is checked after all arguments have been accepted
        load_main()
    assert "there is no folder /nonexistent" in capsys.readouterr().err
