"""Our logs, where Ray Serve's are: in its files and format, with the id of the request they belong to."""

import logging

from ray import serve
from transformers.utils.logging import disable_progress_bar

OURS = ("deployments", "parse")
SERVES = "ray.serve"


def join_serve() -> None:
    """In a replica Serve sets up its own logger only; what is told elsewhere would be lost, or without its request."""
    if serve.context._get_internal_replica_context() is None:
        return
    disable_progress_bar()
    for name in OURS:
        logging.getLogger(name).parent = logging.getLogger(SERVES)


def flush() -> None:
    """Where Serve is set to throughput, it gathers a thousand lines before it writes them."""
    for handler in logging.getLogger(SERVES).handlers:
        handler.flush()
