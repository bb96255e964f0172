"""The interface between the HTTP API and the router that it runs in."""

from collections.abc import Sequence
from typing import Protocol

from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import MetricsRecorder
from deployments.session import Session
from parse.pipeline import Pipeline


class Backend(Protocol):
    @property
    def pipeline(self) -> Pipeline:
        """A pipeline for everything that does not belong to a session."""
        ...

    def pipeline_for_session(self, session: Session) -> Pipeline: ...

    def unavailable_parts(self) -> dict[str, str]:
        """Returns the parts that do not respond, and what is wrong with each."""
        ...

    async def deployment_failure(self) -> str | None:
        """Returns why the last deployment failed, or None. An earlier version of the application is then serving."""
        ...

    @property
    def recorder(self) -> MetricsRecorder: ...

    def update_metrics(self) -> None:
        """Records the metrics that are not recorded by events, such as gauges."""
        ...

    async def collect_peer_metrics(self) -> Sequence[ReplicaMetrics]:
        """Returns the metrics of all other replicas that respond in time."""
        ...
