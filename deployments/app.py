"""What serve_config.yaml imports: the application, built from its settings."""

from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments.config import AppSettings, located
from deployments.serving.drafter import Drafter
from deployments.serving.replica import Host
from deployments.serving.router import Router
from deployments.serving.verifier import Verifier
from parse.config import EngineSettings

# One session, one replica, as long as it has room.
AFFINITY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
HEALTH: dict[str, Any] = {"health_check_period_s": 5, "health_check_timeout_s": 20}
# A line for every request is written by the router's journal; one for every call between replicas would drown it.
LOGGING = {"encoding": "JSON", "enable_access_log": False}
SPARE = 64  # requests beyond those answered or waiting: somebody must tell the others that there are too many


def build(args: AppSettings) -> Application:
    """A router before verifiers and, with a draft model, drafters.

    `deployments` in serve_config.yaml may change their replicas, autoscaling and resources.
    """
    target = _located(args.target)
    draft = _located(args.draft) if args.draft else None
    gpus = _gpus_each([model for model in (target, draft) if model])
    verifier = _hosting(Verifier, target, gpus).bind(target)
    drafter = None
    if draft:
        # More in the queue would wait longer than a draft is worth.
        drafter = (
            _hosting(Drafter, draft, gpus).options(max_queued_requests=draft.max_running).bind(draft, target.model)
        )
    settings = args.model_copy(update={"target": target, "draft": draft})
    router = serve.deployment(
        name="Router",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=args.api.max_answers + args.api.max_waiting + SPARE,
        graceful_shutdown_timeout_s=args.api.request_timeout_s,
        logging_config=LOGGING,
        **HEALTH,
    )
    return router(Router).bind(settings, verifier, drafter)


def _hosting(kind: type[Host], settings: EngineSettings, gpus: float) -> Deployment:
    hosting = serve.deployment(
        name=kind.__name__,
        ray_actor_options={"num_cpus": 0.3, "num_gpus": 0 if settings.device == "cpu" else gpus},
        max_ongoing_requests=2 * settings.max_running,
        logging_config=LOGGING,
        request_router_config=RequestRouterConfig(request_router_class=AFFINITY),  # type: ignore[arg-type]
        **HEALTH,
    )
    return hosting(kind)


def _located(settings: EngineSettings) -> EngineSettings:
    ways = tuple(
        way.model_copy(update={"head": located(way.head)}) if way.head else way for way in settings.speculation
    )
    return settings.model_copy(update={"model": located(settings.model), "speculation": ways})


def _gpus_each(models: Sequence[EngineSettings]) -> float:
    """One of its own, a part of what there is, or none."""
    wanting = sum(model.device != "cpu" for model in models)
    if not wanting or not ray.is_initialized():
        return 0
    return min(1.0, int(ray.cluster_resources().get("GPU", 0)) / wanting)
