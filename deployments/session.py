"""A session: the calls that the router makes for one answer."""

from dataclasses import dataclass, field
from typing import Literal

from opentelemetry.context import Context

RetryCause = Literal["died", "cancelled", "stopped", "unavailable"]


@dataclass
class Session:
    """Calls that go to the same replica, unless that replica is full or lost."""

    key: str
    request_id: str = ""
    trace_context: Context | None = None
    """The trace of the answer that the calls are made for."""
    counts_as_busy: bool = True
    """Whether the calls serve a client and therefore count as busy time."""
    retry_causes: list[RetryCause] = field(default_factory=list)

    @property
    def num_retries(self) -> int:
        return len(self.retry_causes)

    @property
    def id(self) -> str:
        """Changes with every retry.

        A retry therefore goes to another replica if there is one.
        """
        return f"{self.key}/{self.num_retries}" if self.num_retries else self.key
