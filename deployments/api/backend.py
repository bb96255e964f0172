"""What the HTTP side needs of whoever answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.context import Context

from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import MetricsRecorder, RetryCause
from parse.pipeline import Pipeline


@dataclass
class Session:
    """Calls that belong together: they meet the same replica, until one is lost with it."""

    key: str
    request_id: str = ""
    trace_context: Context | None = None  # of the answer they are made for
    counts_as_busy: bool = True  # as work for a client
    retry_causes: list[RetryCause] = field(default_factory=list)

    @property
    def num_retries(self) -> int:
        return len(self.retry_causes)

    @property
    def id(self) -> str:
        return f"{self.key}/{self.num_retries}" if self.num_retries else self.key


class Backend(Protocol):
    @property
    def pipeline(self) -> Pipeline:
        """For what does not depend on a session."""
        ...

    def pipeline_for_session(self, session: Session) -> Pipeline: ...

    def unavailable_parts(self) -> dict[str, str]:
        """Which part does not answer at the moment, and what is wrong with it."""
        ...

    @property
    def recorder(self) -> MetricsRecorder: ...

    def update_metrics(self) -> None:
        """Tells the figures that are not told as things happen."""
        ...

    async def collect_peer_metrics(self) -> Sequence[ReplicaMetrics]:
        """The figures of all other replicas that can be reached in time."""
        ...
