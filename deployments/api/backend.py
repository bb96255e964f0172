"""What the HTTP side needs of whoever answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.context import Context

from deployments.observability.exposition import Figures
from deployments.observability.metrics import LostCause, Meters
from parse.pipeline import Pipeline


@dataclass
class Session:
    """Calls that belong together: they meet the same replica, until one is lost with it."""

    key: str
    request_id: str = ""
    trace: Context | None = None  # of the answer they are made for
    counted: bool = True  # as work for a client
    lost: list[LostCause] = field(default_factory=list)

    @property
    def retries(self) -> int:
        return len(self.lost)

    @property
    def id(self) -> str:
        return f"{self.key}/{self.retries}" if self.retries else self.key


class Backend(Protocol):
    @property
    def pipeline(self) -> Pipeline:
        """For what does not depend on a session."""
        ...

    def session_pipeline(self, session: Session) -> Pipeline: ...

    def troubles(self) -> dict[str, str]:
        """Which part does not answer at the moment, and what is wrong with it."""
        ...

    @property
    def meters(self) -> Meters: ...

    def measure(self) -> None:
        """Tells the figures that are not told as things happen."""
        ...

    async def others(self) -> Sequence[Figures]:
        """The figures of all other replicas that can be reached in time."""
        ...
