"""Errors that callers may receive.

They can come from another process, so all of them can be pickled.
"""

from typing import Literal


class RequestError(ValueError):
    """A request that cannot be served.

    The error names the invalid field and its limit.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, str]]:
        return type(self), (self.field, self.message)


class ModelLoadError(ValueError):
    """A model that cannot be loaded.

    The error names the argument, the model and what is wrong, in one line.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument
        self.message = message

    def __reduce__(self) -> tuple[type["ModelLoadError"], tuple[str, str]]:
        return type(self), (self.argument, self.message)


class NumericalError(RuntimeError):
    """The model returned logits that are not finite."""


class RequestCancelled(RuntimeError):
    """The caller cancelled the request."""


class EngineStopped(RuntimeError):
    """The engine was shut down or died before the request was finished."""


class EngineFailed(EngineStopped):
    """The engine died. Its process has to be replaced."""


class ServerError(RuntimeError):
    """The server that runs a model answered a call with an error, and repeating the call did not help."""


FallbackCause = Literal[
    "none_there",
    "does_not_pay",
    "busy",
    "lost",
    "silent",
    "slow",
    "refused",
    "failed",
    "reasoning",
    "unreliable",
    "unsupported",
]
"""Why the target answers without a draft. The values are labels of a Prometheus metric."""


class DraftUnavailable(RuntimeError):
    """No draft is available at the moment."""

    def __init__(self, cause: FallbackCause, message: str) -> None:
        super().__init__(message)
        self.cause: FallbackCause = cause

    def __reduce__(self) -> tuple[type["DraftUnavailable"], tuple[FallbackCause, str]]:
        return type(self), (self.cause, str(self))


class VerificationError(RuntimeError):
    """The result of a verification does not match its request."""
