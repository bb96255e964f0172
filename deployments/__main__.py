"""Starts the service of a configuration on this machine, until Ctrl-C.

It starts Ray, deploys the configuration, and waits until the service is ready. With --address, the application is
deployed on a running cluster instead, and continues to run there.
"""

import argparse
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments.config import IS_CHECKOUT, PROJECT_ROOT

# The wheel contains a copy of this file inside the package.
DEFAULT_CONFIG = PROJECT_ROOT / "serve_config.yaml" if IS_CHECKOUT else Path(__file__).with_name("serve_config.yaml")
RAY_DEFAULT_TOKEN_FILE = Path.home() / ".ray" / "auth_token"
TOKEN_FILE = Path.home() / ".cache" / "parse-serve" / "ray_token"
# With these settings, the calls of a replica share one event loop and bypass Ray's object store. That is safe because
# the models compute in separate threads. It was measured to give 1.3 times the throughput with one client, and 1.5
# times with eight.
THROUGHPUT_ENVIRONMENT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # it would open more ports
}
# The proxy limits the headers of requests. The name is repeated here, because Ray must not be imported yet.
PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.serving.connection_limits:install",
}

OTEL_ENDPOINT_VARIABLES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
TRACING_ENVIRONMENT = {
    "OTEL_SERVICE_NAME": "parse-serve",
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.observability.tracing:otlp",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1.0",
}


def set_ray_environment() -> None:
    """Sets the environment variables that Ray reads when it is imported."""
    is_traced = any(name in os.environ for name in OTEL_ENDPOINT_VARIABLES)
    environment = THROUGHPUT_ENVIRONMENT | PROXY_ENVIRONMENT | (TRACING_ENVIRONMENT if is_traced else {})
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    require_ray_token()


def require_ray_token() -> None:
    """Makes Ray require a token.

    Ray's ports are open to the network, and without a token anyone could run code through them.

    The token is not stored in Ray's default file, because every cluster on this machine would then require it.
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
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        default=DEFAULT_CONFIG,
        help="the configuration (default: serve_config.yaml, which serves the demo pair)",
    )
    parser.add_argument(
        "--address", help="the address of a running cluster; auto finds the cluster that runs on this machine"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="the seconds to wait until the service is ready (default: 600)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    set_ray_environment()
    import ray  # after the environment is set

    from deployments.launch import LaunchError, serve

    for signum in (signal.SIGINT, signal.SIGTERM):  # explicit, because a shell makes background jobs ignore SIGINT
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
