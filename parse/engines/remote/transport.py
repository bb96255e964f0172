"""How calls reach a server: over HTTP (`server.py`), or in another way that the caller of the loader provides."""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol

from parse.engine_config import RemoteEngineConfig


class Transport(Protocol):
    """Calls one server. Paths and JSON are those of its HTTP API.

    A lost call raises ServerUnavailable, a rejected one RequestError, and a call that the server does not have
    ServerError.
    """

    @property
    def url(self) -> str:
        """The name of the server in logs and errors."""
        ...

    def for_session(self, session_key: str) -> "Transport":
        """Returns a client whose calls go to one replica, if the server consists of several."""
        ...

    async def get_json(self, path: str) -> Any: ...

    async def get_text(self, path: str) -> str: ...

    async def post(self, path: str, body: Mapping[str, Any]) -> Any: ...

    def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """Yields the events of the response. Closing the generator ends the call on the server too."""
        ...

    def close(self) -> None:
        """Closes the connections. Any thread may call this, also after the event loop has ended."""
        ...

    async def aclose(self) -> None:
        """Closes the connections, in the event loop of the calls."""
        ...


class Address(Protocol):
    """Where a server is."""

    def open(self) -> Transport: ...


FindDeployment = Callable[[RemoteEngineConfig], Address | None]
"""Returns where the deployment of the settings is, or None if it is still being deployed.

Raises ValueError if there is no such deployment. `parse` has no such function itself, because it does not use Ray."""
