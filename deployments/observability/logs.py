"""Our logs, where Ray Serve's are: in its files and format, with the id of the request they belong to."""

import logging

from ray import serve
from transformers.utils.logging import disable_progress_bar

OWN_LOGGERS = ("deployments", "parse")
SERVE_LOGGER = "ray.serve"


def attach_to_serve_logger() -> None:
    """In a replica Serve sets up its own logger only; what is told elsewhere would be lost, or without its request."""
    if serve.context._get_internal_replica_context() is None:
        return
    disable_progress_bar()
    for name in OWN_LOGGERS:
        logging.getLogger(name).parent = logging.getLogger(SERVE_LOGGER)


def flush_serve_logger() -> None:
    """Where Serve is set to throughput, it gathers a thousand lines before it writes them."""
    for handler in logging.getLogger(SERVE_LOGGER).handlers:
        handler.flush()
