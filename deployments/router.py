"""The way in: answers HTTP, and runs the pipeline over drafters and verifiers."""

import os
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from deployments.backend import Session
from deployments.config import AppSettings
from deployments.host import Description
from deployments.http import create_app
from deployments.remote import RemoteDrafter, RemoteVerifier, Watch
from parse.config import MethodSettings
from parse.pipeline import Pipeline
from parse.prompts import check_ids


@serve.ingress()
class Router:
    """`deployments.backend.Backend` over Ray Serve."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: AppSettings, verifier: DeploymentHandle, drafter: DeploymentHandle | None
    ) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it needs no GPU and takes no memory of one
        self._settings = settings
        target = settings.target.model
        method = MethodSettings.for_model(target, **settings.method.model_dump(exclude_unset=True))
        tokenizer = AutoTokenizer.from_pretrained(target)
        check = check_ids(tokenizer, method.check_question, method.correct, method.incorrect)
        self._verifier, self._drafter = verifier, drafter
        longest = (await verifier.describe.remote()).max_context
        self._watches = {"verifier": Watch("verifier", verifier)}
        if drafter is not None:
            self._watches["drafter"] = Watch("drafter", drafter)
        self._pipeline = Pipeline(
            verifier=RemoteVerifier(verifier, Session(""), self._watches["verifier"]),
            tokenizer=tokenizer,
            check=check,
            settings=method,
            longest=longest,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings.api, self._settings.model_name)

    async def describe(self) -> Description:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Description(self._settings.model_name, "none", visible, self._pipeline.longest or 0, os.getpid())

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
