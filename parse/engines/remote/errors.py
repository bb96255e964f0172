"""What can go wrong with a call to a server."""

from parse.errors import EngineStopped


class ServerUnavailable(Exception):
    """The call was lost. It can be repeated, on this server or on another one."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0, reached: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reached = reached
        """Whether the server itself answered. If so, repeating the call may well give the same answer."""


class ServerError(EngineStopped):
    """A call failed, and repeating it did not help. The message is for the client."""


class WrongModel(ServerUnavailable):
    """The server serves another model than at the start."""
