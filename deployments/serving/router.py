"""The way in: answers HTTP, and runs the pipeline over drafters and verifiers."""

import os
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from deployments.api.backend import Session
from deployments.api.routes import create_app
from deployments.config import AppSettings
from deployments.observability import logs, metrics
from deployments.observability.exposition import Figures
from deployments.observability.metrics import Meters
from deployments.observability.metrics_collection import gathered
from deployments.serving.circuit_breaker import Watch
from deployments.serving.clients import RemoteDrafter, RemoteVerifier
from deployments.serving.overlap import Overlap
from deployments.serving.replica import Description
from parse.config import MethodSettings
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix


@serve.ingress()
class Router:
    """`deployments.api.backend.Backend` over Ray Serve."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: AppSettings, verifier: DeploymentHandle, drafter: DeploymentHandle | None
    ) -> None:
        logs.join_serve()
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it needs no GPU and takes no memory of one
        self._settings = settings
        target = settings.target.model
        method = MethodSettings.for_model(target, **settings.method.model_dump(exclude_unset=True))
        tokenizer = AutoTokenizer.from_pretrained(target)
        check = build_verification_suffix(tokenizer, method.check_question, method.correct, method.incorrect)
        self._verifier, self._drafter = verifier, drafter
        longest = (await verifier.describe.remote()).max_context
        self._overlap = Overlap()
        self._meters = Meters(metrics.OF_ROUTERS, deployment="Router")
        self._routers = serve.get_deployment_handle(self._meters.origin.deployment, self._meters.origin.application)
        self._watches = {"verifier": Watch("verifier", verifier, self._overlap)}
        if drafter is not None:
            self._watches["drafter"] = Watch("drafter", drafter, self._overlap)
        self._pipeline = Pipeline(
            verifier=RemoteVerifier(verifier, Session(""), self._watches["verifier"]),
            tokenizer=tokenizer,
            check=check,
            settings=method,
            longest=longest,
            methods=tuple(way.method for way in settings.target.speculation),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings.api, self._settings.model_name, self._settings.audit)

    async def describe(self) -> Description:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Description(self._settings.model_name, "none", visible, self._pipeline.longest or 0, os.getpid())

    async def figures(self) -> Figures:
        return self._meters.figures()

    @property
    def meters(self) -> Meters:
        return self._meters

    def measure(self) -> None:
        overlap = self._overlap
        overlap.tell()
        for part, seconds in (
            ("drafter", overlap.drafter_s),
            ("verifier", overlap.verifier_s),
            ("both", overlap.both_s),
        ):
            self._meters.reach(metrics.BUSY, seconds, part=part)
        for name, watch in self._watches.items():
            self._meters.set(metrics.TROUBLE, watch.trouble is not None, part=name)

    async def others(self) -> list[Figures]:
        """A scrape reaches one router only: it tells of all."""
        handles = {"Verifier": self._verifier, "Router": self._routers}
        if self._drafter is not None:
            handles["Drafter"] = self._drafter
        own = self._meters.origin
        return [found for found in await gathered(handles, self._meters) if found.origin != own]

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline

    def session_pipeline(self, session: Session) -> Pipeline:
        services: dict[str, Any] = {"verifier": RemoteVerifier(self._verifier, session, self._watches["verifier"])}
        if self._drafter is not None:
            services["drafter"] = RemoteDrafter(self._drafter, session, self._watches["drafter"])
        return replace(self._pipeline, **services)

    def troubles(self) -> dict[str, str]:
        return {name: watch.trouble for name, watch in self._watches.items() if watch.trouble}
