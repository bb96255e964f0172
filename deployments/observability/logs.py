"""Logging inside replicas.

Log lines go to the files of Ray Serve, in its format and with the id of the request.
"""

import logging

from ray import serve
from transformers.utils.logging import disable_progress_bar

OWN_LOGGERS = ("deployments", "parse")
SERVE_LOGGER = "ray.serve"


def attach_to_serve_logger() -> None:
    """Sends the logs of this project to Serve's logger.

    Serve configures no other logger in a replica.
    """
    if serve.context._get_internal_replica_context() is None:
        return
    disable_progress_bar()
    for name in OWN_LOGGERS:
        logging.getLogger(name).parent = logging.getLogger(SERVE_LOGGER)


def flush_serve_logger() -> None:
    """Writes buffered log lines.

    With its throughput settings, Serve buffers a thousand of them.
    """
    for handler in logging.getLogger(SERVE_LOGGER).handlers:
        handler.flush()


def last_line_of_traceback(message: str) -> str:
    """Returns the error at the end of a traceback, or a message without a traceback as it is."""
    return message.strip().splitlines()[-1] if "Traceback (most recent call last)" in message else message
