"""Starts Ray, deploys serve_config.yaml, waits until the service is ready, and stops everything on Ctrl-C.

With --address the application is deployed on a running cluster, and keeps running there.
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
# The calls of a replica share one event loop and bypass Ray's object store. That is safe because the models compute in
# threads of their own. Measured: 1.3 times the throughput with one client, 1.5 times with eight.
THROUGHPUT_ENVIRONMENT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # it would open more ports
}

OTEL_ENDPOINT_VARIABLES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
TRACING_ENVIRONMENT = {
    "OTEL_SERVICE_NAME": "parse-serve",
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.observability.tracing:otlp",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
}


def set_ray_environment() -> None:
    """Sets the environment variables that Ray reads when it is imported."""
    environment = THROUGHPUT_ENVIRONMENT | (
        TRACING_ENVIRONMENT if any(name in os.environ for name in OTEL_ENDPOINT_VARIABLES) else {}
    )
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    require_ray_token()


def require_ray_token() -> None:
    """Makes Ray require a token.

    Ray's ports are open to the network, and without a token anyone could run code through them.

    The token is stored apart from Ray's own, which would make every cluster on this machine require it.
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
    parser.add_argument("--address", help="address of a running cluster; auto finds the one on this machine")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for the service (default: 600)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    set_ray_environment()
    import ray  # after the environment is set

    from deployments.launch import LaunchError, serve

    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell ignores SIGINT for background jobs
        signal.signal(signum, signal.default_int_handler)
    try:
        serve(args.config, address=args.address, timeout_s=args.timeout)
        if args.address is None:
            print("Press Ctrl-C to stop.", flush=True)
            signal.pause()
    except LaunchError as reason:
        sys.exit(f"python -m deployments: {reason}")
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
