"""The router deployment: serves the HTTP API and runs the pipeline.

Each answer is a task of its own, which `CompletionHandler` starts (`deployments/api/handlers.py`). `AdmissionQueue`
limits how many run. Drafters and verifiers batch the calls of all tasks, so drafting one request overlaps with
verifying other requests. This needs no coordination. `VerifierClient` and `DrafterClient` handle replicas that fail.
"""

import asyncio
import os
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from transformers import AutoTokenizer

from deployments.api.routes import create_app
from deployments.config import AppSettings
from deployments.observability import logs, metrics
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.logs import last_line_of_traceback
from deployments.observability.metrics import MetricsRecorder
from deployments.serving.busy_time import BusyTime
from deployments.serving.circuit_breaker import CircuitBreaker
from deployments.serving.metrics_collection import collect_replica_metrics
from deployments.serving.replica import ReplicaInfo
from deployments.serving.replica_clients import DrafterClient, VerifierClient
from deployments.session import Session
from parse.config import VerificationSettings
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix
from parse.verification_check import measure_answer_mass, without_unreliable_modes

STATUS_TIMEOUT_S = 2.0


@serve.ingress()
class Router:
    """Implements `deployments.api.backend.Backend` with Ray Serve."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: AppSettings, verifier: DeploymentHandle, drafter: DeploymentHandle | None
    ) -> None:
        logs.attach_to_serve_logger()
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the router needs no GPU, and must not allocate memory on one
        self._settings = settings
        target = settings.target.model
        tokenizer = AutoTokenizer.from_pretrained(target)
        verification = VerificationSettings.for_model(target, **settings.verification.model_dump(exclude_unset=True))
        template_kwargs = settings.target.chat_template_kwargs
        suffix = build_verification_suffix(
            tokenizer,
            verification.prompt,
            verification.correct,
            verification.incorrect,
            template_kwargs=template_kwargs,
        )
        self._verifier, self._drafter = verifier, drafter
        self._busy_time = BusyTime()
        self._recorder = MetricsRecorder(metrics.ROUTER_METRICS, deployment="Router")
        self._routers = serve.get_deployment_handle(
            self._recorder.replica_labels.deployment, self._recorder.replica_labels.application
        )
        self._circuit_breakers = {"verifier": CircuitBreaker("verifier", verifier, self._busy_time)}
        if drafter is not None:
            self._circuit_breakers["drafter"] = CircuitBreaker("drafter", drafter, self._busy_time)
        client = VerifierClient(verifier, Session(""), self._circuit_breakers["verifier"])
        capabilities = await verifier.capabilities.remote()
        answer_mass = await measure_answer_mass(
            client,
            tokenizer,
            suffix,
            verification.self_check_prompts,
            capabilities.max_model_len,
            template_kwargs,
        )
        self._pipeline = Pipeline(
            verifier=client,
            capabilities=without_unreliable_modes(capabilities, answer_mass, verification, target),
            chat_template_kwargs=template_kwargs,
            tokenizer=tokenizer,
            suffix=suffix,
            settings=verification,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings.api, self._settings.model_name, self._settings.audit)

    async def describe(self) -> ReplicaInfo:
        visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        max_model_len = self._pipeline.capabilities.max_model_len
        return ReplicaInfo(self._settings.model_name, "none", visible_gpus, max_model_len, os.getpid())

    async def collect_metrics(self) -> ReplicaMetrics:
        return self._recorder.collect()

    @property
    def recorder(self) -> MetricsRecorder:
        return self._recorder

    def update_metrics(self) -> None:
        busy_time = self._busy_time
        busy_time.update()
        for part, seconds in (
            ("drafter", busy_time.drafter_s),
            ("verifier", busy_time.verifier_s),
            ("both", busy_time.both_s),
        ):
            self._recorder.update_total(metrics.BUSY_SECONDS, seconds, part=part)
        for name, circuit_breaker in self._circuit_breakers.items():
            self._recorder.set(metrics.PART_UNAVAILABLE, circuit_breaker.failure is not None, part=name)

    async def collect_peer_metrics(self) -> list[ReplicaMetrics]:
        """Returns the metrics of all other replicas.

        A scrape reaches only one router, so this router collects the others.
        """
        handles = {"Verifier": self._verifier, "Router": self._routers}
        if self._drafter is not None:
            handles["Drafter"] = self._drafter
        own_labels = self._recorder.replica_labels
        return [
            replica
            for replica in await collect_replica_metrics(handles, self._recorder)
            if replica.labels != own_labels
        ]

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline

    def pipeline_for_session(self, session: Session) -> Pipeline:
        services: dict[str, Any] = {
            "verifier": VerifierClient(self._verifier, session, self._circuit_breakers["verifier"])
        }
        if self._drafter is not None:
            services["drafter"] = DrafterClient(self._drafter, session, self._circuit_breakers["drafter"])
        return replace(self._pipeline, **services)

    async def deployment_failure(self) -> str | None:
        """Asks Ray Serve. Returns None if it does not answer."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                status = await asyncio.to_thread(serve.status)
        except (TimeoutError, RayError, RayServeException):
            return None
        application = status.applications.get(self._recorder.replica_labels.application)
        if application is None or application.status != ApplicationStatus.DEPLOY_FAILED:
            return None
        return last_line_of_traceback(application.message)

    def unavailable_parts(self) -> dict[str, str]:
        return {
            name: circuit_breaker.failure
            for name, circuit_breaker in self._circuit_breakers.items()
            if circuit_breaker.failure
        }
