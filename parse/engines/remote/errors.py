"""What can go wrong with a call to a server."""


class ServerUnavailable(Exception):
    """The call was lost. It can be repeated, on this server or on another one."""

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, deterministic: bool = False, interrupted: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.deterministic = deterministic
        """Whether repeating the call may well give the same result, because the server answered it with an error."""
        self.interrupted = interrupted
        """Whether the connection was lost while the server worked on the call, for example because the server ended."""


class WrongModel(ServerUnavailable):
    """The server serves another model than at the start."""
