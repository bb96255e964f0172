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

from deployments.config import PROJECT_ROOT

DEFAULT_CONFIG = PROJECT_ROOT / "serve_config.yaml"
RAY_DEFAULT_TOKEN_FILE = Path.home() / ".ray" / "auth_token"
TOKEN_FILE = Path.home() / ".cache" / "parse-serve" / "ray_token"
# A replica's calls share one event loop, and go from replica to replica without Ray's object store: the models compute
# in threads of their own. Measured: 1.3 times the requests one at a time, 1.5 times eight at a time.
THROUGHPUT_ENVIRONMENT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}  # no further open ports

OTEL_ENDPOINT_VARIABLES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
TRACING_ENVIRONMENT = {
    "OTEL_SERVICE_NAME": "parse-serve",
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.observability.tracing:otlp",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
}


def set_ray_environment() -> None:
    """What Ray reads in its environment when it is imported."""
    environment = THROUGHPUT_ENVIRONMENT | (
        TRACING_ENVIRONMENT if any(name in os.environ for name in OTEL_ENDPOINT_VARIABLES) else {}
    )
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    require_ray_token()


def require_ray_token() -> None:
    """Ray's ports are open to the network, where without a token anybody could run code here.

    The token is kept apart from Ray's own: once that exists, every cluster on this machine would demand it.
    """
    if "RAY_AUTH_MODE" in os.environ or RAY_DEFAULT_TOKEN_FILE.exists():
        return
    if not TOKEN_FILE.exists():
        TOKEN_FILE.parent.mkdir(parents=True, exist_ok=True)
        TOKEN_FILE.touch(mode=0o600)
        TOKEN_FILE.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN_FILE)}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deployments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT_CONFIG, help="default: the demo pair")
    parser.add_argument("--address", help="of a running cluster; auto finds the one on this machine")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait until it answers (default: 600)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    set_ray_environment()
    import ray  # only now

    from deployments.launch import LaunchError, serve

    for signum in (signal.SIGINT, signal.SIGTERM):  # also where a shell has turned the first off for its background
        signal.signal(signum, signal.default_int_handler)
    try:
        serve(args.config, address=args.address, timeout_s=args.timeout)
        if args.address is None:
            print("Ctrl-C stops it.", flush=True)
            signal.pause()
    except LaunchError as reason:
        sys.exit(f"python -m deployments: {reason}")
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
