"""What the HTTP side needs of whoever answers."""

from dataclasses import dataclass
from typing import Protocol

from parse.pipeline import Pipeline


@dataclass
class Session:
    """Calls that belong together: they meet the same replica, until one is lost with it."""

    key: str
    retries: int = 0

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
