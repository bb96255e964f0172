"""Builds the application from its settings.

`serve_config.yaml` names `build` as its `import_path`.
"""

from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments.config import AppSettings, resolve_model_path
from deployments.serving.deployment_lookup import find_deployment
from deployments.serving.drafter import Drafter
from deployments.serving.replica import ModelReplica
from deployments.serving.router import Router
from deployments.serving.trial_start import check_start
from deployments.serving.verifier import Verifier
from parse.config import EngineSettings
from parse.deployment_check import check_models
from parse.engine_config import NativeEngineConfig, VLLMEngineConfig
from parse.engines.native.checkpoint import machine_bytes
from parse.engines.vllm.installation import is_importable

# The calls of a session go to the same replica unless that replica is full.
SESSION_AFFINITY_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
HEALTH_CHECK_OPTIONS: dict[str, Any] = {"health_check_period_s": 5, "health_check_timeout_s": 20}
# The router writes one log line per request. Serve would add one line for every call between replicas.
LOGGING_CONFIG = {"encoding": "JSON", "enable_access_log": False}
REJECT_MARGIN = 64  # more requests than can run or wait, which the router accepts only to reject them with a 503


def build(args: AppSettings) -> Application:
    """Checks the models and returns the application.

    If this raises, the replicas of an earlier version keep serving.
    """
    application, settings = assemble(args)
    check_models(
        settings.target,
        settings.draft,
        settings.verification,
        memory_bytes=_shared_memory_bytes(settings),
        on_this_node=len(_live_nodes()) == 1,
        find_deployment=find_deployment,
    )
    gpus_per_model = _gpus_per_model(settings)
    check_start("target", Verifier.__name__, settings.target, _num_gpus(settings.target, gpus_per_model))
    if settings.draft:
        check_start("draft", Drafter.__name__, settings.draft, _num_gpus(settings.draft, gpus_per_model))
    return application


def assemble(args: AppSettings) -> tuple[Application, AppSettings]:
    """Returns a router in front of verifiers and, with a draft model, drafters. Also returns the resolved settings.

    `deployments` in serve_config.yaml can change their replicas, autoscaling and resources.
    """
    target = _resolve_model_paths(args.target)
    draft = _resolve_model_paths(args.draft) if args.draft else None
    settings = args.model_copy(update={"target": target, "draft": draft})
    gpus_per_model = _gpus_per_model(settings)
    verifier = _model_deployment(Verifier, target, gpus_per_model).bind(target)
    drafter = None
    if draft:
        # A longer queue would delay requests for longer than a draft can save.
        drafter = (
            _model_deployment(Drafter, draft, gpus_per_model)
            .options(max_queued_requests=draft.max_num_seqs)
            .bind(draft, target.model)
        )
    router = serve.deployment(
        name="Router",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=args.api.max_answers + args.api.max_queued_requests + REJECT_MARGIN,
        graceful_shutdown_timeout_s=args.api.request_timeout_s,
        logging_config=LOGGING_CONFIG,
        **HEALTH_CHECK_OPTIONS,
    )
    return router(Router).bind(settings, verifier, drafter), settings


def _model_deployment(replica_class: type[ModelReplica], settings: EngineSettings, gpus: float) -> Deployment:
    decorate = serve.deployment(
        name=replica_class.__name__,
        ray_actor_options={"num_cpus": 0.3, "num_gpus": _num_gpus(settings, gpus)},
        max_ongoing_requests=2 * settings.max_num_seqs,
        logging_config=LOGGING_CONFIG,
        request_router_config=RequestRouterConfig(request_router_class=SESSION_AFFINITY_ROUTER),  # type: ignore[arg-type]
        **HEALTH_CHECK_OPTIONS,
    )
    return decorate(replica_class)


def _resolve_model_paths(settings: EngineSettings) -> EngineSettings:
    configs = tuple(
        config.model_copy(update={"model": resolve_model_path(config.model)}) if config.model else config
        for config in settings.speculative_configs
    )
    return settings.model_copy(update={"model": resolve_model_path(settings.model), "speculative_configs": configs})


def _models(settings: AppSettings) -> list[EngineSettings]:
    return [settings.target, *([settings.draft] if settings.draft else [])]


def _shared_memory_bytes(settings: AppSettings) -> int | None:
    """Returns the memory of this machine if it is certain that all models run on its CPUs.

    With the device `auto`, a node with GPUs may still join the cluster.
    """
    models = _models(settings)
    on_cpus = all(model.device == "cpu" for model in models if isinstance(model.engine, NativeEngineConfig))
    nodes = _live_nodes()
    return machine_bytes() if on_cpus and len(nodes) == 1 and nodes[0]["Resources"].get("CPU", 0) else None


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []


def _gpus_per_model(settings: AppSettings) -> float:
    """Returns the number of GPUs for one replica of a model.

    It is 1 if there is a GPU for each model, otherwise an equal share, and 0 without GPUs.
    """
    models = _models(settings)
    num_gpu_models = sum(map(_needs_gpu, models))
    if not num_gpu_models or not ray.is_initialized():
        return 0
    num_free = int(ray.cluster_resources().get("GPU", 0)) - sum(_num_gpus(model, 0) for model in models)
    return min(1.0, max(num_free, 0) / num_gpu_models)


def _num_gpus(settings: EngineSettings, gpus_per_model: float) -> float:
    """Returns the number of GPUs for one replica of a model.

    vLLM needs as many as its parallel sizes say. Only its build for CPUs, which is used in a cluster without GPUs if no
    other one is installed, needs none.
    """
    engine = settings.engine
    if isinstance(engine, VLLMEngineConfig):
        has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0)
        return engine.num_gpus if has_gpus or engine.executable is not None or is_importable() else 0
    return gpus_per_model if _needs_gpu(settings) else 0


def _needs_gpu(settings: EngineSettings) -> bool:
    return isinstance(settings.engine, NativeEngineConfig) and settings.device != "cpu"
