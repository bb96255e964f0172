"""What is compared: the servers of the baselines and of PARSE, from a configuration of the service."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import AutoConfig

from bench.reproduce.hardware import (
    Allocation,
    Machine,
    UnsupportedConfig,
    allocate,
    enlarged_parallel_sizes,
    num_replicas,
    parallel_sizes,
)
from bench.reproduce.service_variants import CHANGES, service_config
from bench.reproduce.tasks import Tasks
from deployments.config import AppSettings, is_local_path, resolve_model_path
from deployments.launch import BUILDER_IMPORT_PATH
from parse.config import EngineSettings
from parse.demo import DEMO_EAGLE3, DEMO_TARGET
from parse.engine_config import NativeEngineConfig, VLLMEngineConfig
from parse.engines.vllm.command import SERVER_MODULE, model_arguments
from parse.registry import MODES

SUPPORTED = "the target must have the engine kind vllm, and the draft model the kind vllm or native"
NUM_EAGLE3_TOKENS, NUM_DEMO_EAGLE3_TOKENS = 3, 8  # of a proposal
NGRAM_CONFIG = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
TARGET_ALONE, REPEATED = "vllm", "vllm-repeated"
SERVICE_MODES = ("off", *(name for name, mode in MODES.items() if mode.function and name != "off"))
SECRET, HIDDEN = re.compile(r"(token|key|secret|password)$", re.IGNORECASE), "HIDDEN"
SERVICE_START_TIMEOUT_S = 300.0  # besides that of its engines


@dataclass(frozen=True)
class ServerPlan:
    """A server that is started for some of the measurements."""

    name: str
    kind: Literal["vllm", "parse"]
    description: str
    command: tuple[str, ...]
    port: int
    health_path: str
    num_units: int
    """The number of GPUs or cores that it uses."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More environment variables."""
    removed_variables: tuple[str, ...] = ()
    """Environment variables that it does not get."""
    speculation: str | None = None
    """The method with which vLLM speculates."""
    modes: tuple[str, ...] = ()
    """The modes of PARSE that are measured."""
    start_timeout_s: float = 1800.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def shell_command(self) -> str:
        """The command as it can be typed into a shell, without secrets, because reports are shared."""
        removed = [part for name in self.removed_variables for part in ("-u", name)]
        variables = [f"{name}={HIDDEN if SECRET.search(name) else value}" for name, value in self.environment.items()]
        command = [
            HIDDEN if previous.startswith("--") and SECRET.search(previous) else part
            for previous, part in zip(("", *self.command), self.command, strict=False)
        ]
        return shlex.join([*(("env", *removed, *variables) if removed or variables else ()), *command])

    def contender(self, mode: str | None) -> str:
        return self.name if mode is None else self.name.replace("parse", f"parse-{mode}", 1)


@dataclass(frozen=True)
class Omission:
    """Something that is not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ReproduceOptions:
    """What the user chooses."""

    config: Path
    out: Path
    clients: tuple[int, ...] = (1, 8, 32, 128)
    eagle3: str | None = None
    all_gpus_args: Mapping[str, Any] | None = None
    port: int = 8700


@dataclass(frozen=True)
class ReproducePlan:
    """All servers in the order in which they run, and what the reader of the report has to know about them."""

    servers: tuple[ServerPlan, ...]
    clients: tuple[int, ...]
    unit: str
    allocation: Allocation
    tasks: Tasks
    omissions: tuple[Omission, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Files of the output folder, which the commands read."""


@dataclass(frozen=True)
class _Baseline:
    """The parts from which all servers are built."""

    options: ReproduceOptions
    target: EngineSettings
    engine: VLLMEngineConfig
    python: Path
    unit: str

    def server(
        self, name: str, description: str, num_units: int, engine_args: Mapping[str, Any], speculation: str | None
    ) -> ServerPlan:
        environment = dict(self.engine.environment)
        if self.unit == "core":
            environment["OMP_NUM_THREADS"] = str(num_units)
        config = self.engine.model_copy(update={"engine_args": dict(engine_args)})
        address = ("--host", "127.0.0.1", "--port", str(self.options.port))
        return ServerPlan(
            name,
            "vllm",
            description,
            (str(self.python), "-m", SERVER_MODULE, *address, *model_arguments(self.target, config)),
            self.options.port,
            "/health",
            num_units,
            {"VLLM_NO_USAGE_STATS": "1", **environment},
            ("VLLM_API_KEY",) if self.python == Path(sys.executable) else ("PYTHONPATH", "VLLM_API_KEY"),
            speculation,
            start_timeout_s=self.engine.start_timeout_s,
        )


def build_plan(
    options: ReproduceOptions,
    config: Mapping[str, Any],
    settings: AppSettings,
    *,
    machine: Machine,
    python: Path,
    tasks: Tasks,
) -> ReproducePlan:
    """Returns the plan. `python` is the interpreter of the environment with vLLM."""
    application = next(app for app in config["applications"] if app["import_path"] == BUILDER_IMPORT_PATH)
    deployments = {entry["name"]: entry for entry in application.get("deployments") or ()}
    target, engine, draft = _supported_models(settings)
    allocation = allocate(machine, {"Verifier": target, "Drafter": draft}, deployments)
    if machine.gpus and len(machine.gpus) < allocation.total:
        raise UnsupportedConfig(
            f"the configuration needs {allocation.total} GPUs, and this machine has {len(machine.gpus)}: all servers "
            "run on one machine"
        )
    methods, omissions = _speculation_methods(options, settings, engine)
    plain_args = {name: value for name, value in engine.engine_args.items() if name != "speculative_config"}
    if machine.unit == "GPU":
        plain_args |= parallel_sizes(plain_args, num_replicas("Verifier", deployments.get("Verifier", {})))
    baseline = _Baseline(options, target, engine, python, machine.unit)
    enlarged_args, omitted = _all_units_arguments(baseline, plain_args, allocation)
    omissions += omitted
    servers = list(_baselines(baseline, allocation, plain_args, enlarged_args, methods))
    files: dict[str, str] = {}
    composed = next((name for name in methods if name != "ngram"), "ngram")
    for speculation in (None, composed):
        name = "parse" if speculation is None else f"parse-{speculation}"
        variant = service_config(config, options.port, methods[speculation] if speculation else None)
        files[f"configs/{name}.yaml"] = yaml.safe_dump(variant, sort_keys=False)
        servers.append(_parse_server(options, settings, name, allocation.total, speculation))
    servers.append(replace(servers[0], name=REPEATED, description="The target alone again, at the end."))
    return ReproducePlan(
        tuple(servers),
        options.clients,
        machine.unit,
        allocation,
        tasks,
        tuple(omissions),
        (*CHANGES, *_notes(settings, deployments, options, composed, machine.unit), *tasks.notes),
        {**files, **tasks.files},
    )


def _supported_models(settings: AppSettings) -> tuple[EngineSettings, VLLMEngineConfig, EngineSettings]:
    target, draft = settings.target, settings.draft
    if not isinstance(target.engine, VLLMEngineConfig):
        raise UnsupportedConfig(f"target.engine.kind is {target.engine.kind}: {SUPPORTED}")
    if draft is None:
        raise UnsupportedConfig(f"draft is missing: {SUPPORTED}")
    if not isinstance(draft.engine, VLLMEngineConfig | NativeEngineConfig):
        raise UnsupportedConfig(f"draft.engine.kind is {draft.engine.kind}: {SUPPORTED}")
    for field_name, model in ("target", target), ("draft", draft):
        if isinstance(model.engine, VLLMEngineConfig) and model.engine.reserves_gpus:
            raise UnsupportedConfig(
                f"{field_name}.engine.engine_args: distributed_executor_backend ray is not supported, because all "
                "servers run on one machine"
            )
    target = target.model_copy(update={"model": resolve_model_path(target.model)})
    assert isinstance(target.engine, VLLMEngineConfig)
    return target, target.engine, draft


def _speculation_methods(
    options: ReproduceOptions, settings: AppSettings, engine: VLLMEngineConfig
) -> tuple[dict[str, Mapping[str, Any]], list[Omission]]:
    """Returns the `speculative_config` of each method of vLLM, and the methods that are left out.

    That of the configuration itself is one of them. EAGLE-3 needs a head.
    """
    methods: dict[str, Mapping[str, Any]] = {}
    configured = engine.engine_args.get("speculative_config")
    if isinstance(configured, Mapping):
        methods[str(configured.get("method") or "configured")] = configured
    is_demo = is_demo_target(settings)
    head = options.eagle3 or (DEMO_EAGLE3 if is_demo else None)
    omissions = []
    if head is None and "eagle3" not in methods:
        reason = "no EAGLE-3 head was given: pass --eagle3, or set speculative_config in the engine_args of the target"
        omissions.append(Omission("vllm-eagle3 and PARSE with EAGLE-3", reason))
    elif head is not None and is_local_path(head) and not Path(resolve_model_path(head)).is_dir():
        omissions.append(Omission("vllm-eagle3 and PARSE with EAGLE-3", f"there is no folder {head}"))
    elif head is not None:
        num_tokens = NUM_DEMO_EAGLE3_TOKENS if is_demo else NUM_EAGLE3_TOKENS
        methods["eagle3"] = {
            "method": "eagle3",
            "model": resolve_model_path(head),
            "num_speculative_tokens": num_tokens,
        }
    methods.setdefault("ngram", NGRAM_CONFIG)
    return methods, omissions


def is_demo_target(settings: AppSettings) -> bool:
    return Path(resolve_model_path(settings.target.model)).resolve() == Path(DEMO_TARGET).resolve()


def _all_units_arguments(
    baseline: _Baseline, plain_args: Mapping[str, Any], allocation: Allocation
) -> tuple[Mapping[str, Any] | None, list[Omission]]:
    """Returns the arguments of a server on all GPUs or cores of PARSE, or None if there is no such server."""
    if allocation.total == allocation.target:
        reason = f"PARSE uses no more {baseline.unit}s than the target alone"
        return None, [Omission(f"vllm-all-{baseline.unit.lower()}s", reason)]
    if baseline.unit == "core":
        return plain_args, []
    if baseline.options.all_gpus_args is not None:
        enlarged_args = {**plain_args, **baseline.options.all_gpus_args}
        num_gpus = VLLMEngineConfig(kind="vllm", engine_args=enlarged_args).num_gpus
        if num_gpus != allocation.total:
            raise UnsupportedConfig(f"--all-gpus-args use {num_gpus} GPUs, and PARSE uses {allocation.total}")
        return enlarged_args, []
    sizes = enlarged_parallel_sizes(plain_args, allocation.total, _num_attention_heads(baseline.target.model))
    if sizes is None:
        reason = f"no parallel sizes use exactly {allocation.total} GPUs: choose arguments with --all-gpus-args"
        return None, [Omission("vllm-all-gpus", reason)]
    return {**plain_args, **sizes}, []


def _num_attention_heads(model: str) -> int | None:
    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().num_attention_heads)
    except (ValueError, OSError, AttributeError):  # vLLM may support models that this version of transformers does not
        return None


def _baselines(
    baseline: _Baseline,
    allocation: Allocation,
    plain_args: Mapping[str, Any],
    enlarged_args: Mapping[str, Any] | None,
    methods: Mapping[str, Mapping[str, Any]],
) -> Sequence[ServerPlan]:
    """Returns the servers without PARSE: each method on the hardware of the target, and on all of PARSE's hardware."""
    servers = []
    speculation: list[tuple[str | None, Mapping[str, Any] | None]] = [(None, None), *methods.items()]
    for method, config in speculation:
        suffix, title = ("", "") if method is None else (f"-{method}", f" with vLLM's own speculation ({method})")
        more = {"speculative_config": config} if config else {}
        for args, num_units, all_suffix, hardware in (
            (plain_args, allocation.target, "", f"on the {baseline.unit}s of the target"),
            (enlarged_args, allocation.total, f"-all-{baseline.unit.lower()}s", f"on all {baseline.unit}s of PARSE"),
        ):
            if args is not None:
                name = f"{TARGET_ALONE}{suffix}{all_suffix}"
                description = f"The target alone{title} {hardware}."
                servers.append(baseline.server(name, description, num_units, {**args, **more}, method))
    return servers


def _parse_server(
    options: ReproduceOptions, settings: AppSettings, name: str, num_units: int, speculation: str | None
) -> ServerPlan:
    title = "" if speculation is None else f", whose target speculates in vLLM ({speculation})"
    path = options.out / "configs" / f"{name}.yaml"
    timeouts = [
        model.engine.start_timeout_s
        for model in (settings.target, settings.draft)
        if model and isinstance(model.engine, VLLMEngineConfig)
    ]
    timeout_s = max(timeouts) + SERVICE_START_TIMEOUT_S
    return ServerPlan(
        name,
        "parse",
        f"PARSE{title}.",
        (sys.executable, "-m", "deployments", str(path), "--timeout", f"{timeout_s:g}"),
        options.port,
        "/ready",
        num_units,
        removed_variables=(settings.api.api_keys_env,),
        speculation=speculation,
        modes=SERVICE_MODES,
        start_timeout_s=timeout_s + SERVICE_START_TIMEOUT_S,
    )


def _notes(
    settings: AppSettings,
    deployments: Mapping[str, Mapping[str, Any]],
    options: ReproduceOptions,
    composed: str,
    unit: str,
) -> list[str]:
    notes = [
        "The servers run one after the other. The modes of a PARSE server take turns, but between servers the speed "
        "of the machine may change. The target alone is therefore measured again at the end.",
        "A contender that is much slower than the target alone answers only the first of the problems, so that it does "
        "not take too long. The number of its requests is in the table of latencies.",
        f"PARSE is composed with vLLM's method {composed}.",
        "Mode auto is not measured, because it learns from many requests.",
    ]
    if unit == "core":
        notes.append(
            "On this machine without GPUs, servers are limited by their numbers of threads and not pinned to cores. "
            "The load generator, the HTTP servers and Ray use the same cores."
        )
    num_answers = num_replicas("Router", deployments.get("Router", {})) * settings.api.max_answers
    if num_answers < max(options.clients):
        notes.append(
            f"This configuration answers at most {num_answers} requests at the same time (api.max_answers of all "
            "routers). With more clients, requests to PARSE wait in a queue, in mode off too."
        )
    draft = settings.draft
    num_drafts = num_replicas("Drafter", deployments.get("Drafter", {})) * draft.max_num_seqs if draft else 0
    if num_drafts < max(options.clients):
        notes.append(
            f"This configuration writes at most {num_drafts} drafts at the same time (draft.max_num_seqs). With more "
            "clients, further drafts wait, and if too many wait, the target answers without a draft."
        )
    return notes
