"""Starts Ray, deploys serve_config.yaml on it, waits until it answers, and stops all of it on Ctrl-C.

With --address the cluster is one that runs already: the application is deployed there, and stays.
"""

import argparse
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments.config import HOUSE

CONFIG = HOUSE / "serve_config.yaml"
RAYS_OWN_TOKEN = Path.home() / ".ray" / "auth_token"
TOKEN = Path.home() / ".cache" / "parse-serve" / "ray_token"
# A replica's calls share one event loop, and go from replica to replica without Ray's object store: the models compute
# in threads of their own. Measured: 1.3 times the requests one at a time, 1.5 times eight at a time.
FASTER = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}  # no further open ports

OTEL_ENDPOINTS = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
TRACES = {
    "OTEL_SERVICE_NAME": "parse-serve",
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.observability.tracing:otlp",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
}


def prepare_ray() -> None:
    """What Ray reads in its environment when it is imported."""
    wanted = FASTER | (TRACES if any(name in os.environ for name in OTEL_ENDPOINTS) else {})
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    guard_ray()


def guard_ray() -> None:
    """Ray's ports are open to the network, where without a token anybody could run code here.

    The token is kept apart from Ray's own: once that exists, every cluster on this machine would demand it.
    """
    if "RAY_AUTH_MODE" in os.environ or RAYS_OWN_TOKEN.exists():
        return
    if not TOKEN.exists():
        TOKEN.parent.mkdir(parents=True, exist_ok=True)
        TOKEN.touch(mode=0o600)
        TOKEN.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN)}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deployments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG, help="default: the demo pair")
    parser.add_argument("--address", help="of a running cluster; auto finds the one on this machine")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait until it answers (default: 600)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    prepare_ray()
    import ray  # only now

    from deployments.launch import NotServing, serve

    for wish in (signal.SIGINT, signal.SIGTERM):  # also where a shell has turned the first off for its background
        signal.signal(wish, signal.default_int_handler)
    try:
        serve(args.config, address=args.address, timeout_s=args.timeout)
        if args.address is None:
            print("Ctrl-C stops it.", flush=True)
            signal.pause()
    except NotServing as reason:
        sys.exit(f"python -m deployments: {reason}")
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
