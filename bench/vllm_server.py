"""Runs an unmodified vLLM for CPUs, for benchmarks and tests.

python -m bench.vllm_server install              installs it, and prints its folder
python -m bench.vllm_server serve models/demo-target --port 8001
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parse.engines.vllm.installation import NEWEST, VLLMUnavailable, install
from parse.engines.vllm.server_process import SUPERVISOR

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started."""

    model: str
    num_threads: int = 1
    max_model_len: int = 1024
    version: str = NEWEST
    block_size: int | None = None
    speculative_config: Mapping[str, Any] | None = None
    more: Sequence[str] = ()
    """More arguments of vLLM's server."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class VLLMServer:
    """A running server."""

    options: ServerOptions
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                if response.status == 200:
                    return
            time.sleep(0.25)
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "rror" in line][-3:] or lines[-3:]
        self.kill()
        raise VLLMUnavailable(f"vLLM did not start: {' '.join(errors)[-600:]}")

    def restart(self) -> None:
        """Starts the server again, on the same port."""
        self.process = start(self.options, port=self.port).process

    def kill(self) -> None:
        """Ends the server and the processes that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def start(options: ServerOptions, *, port: int | None = None, wait: bool = True) -> VLLMServer:
    folder = install(options.version)
    port = port or free_port()
    command = [
        str(folder / "bin" / "python"),
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", options.model, "--served-model-name", Path(options.model).name),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(options.max_model_len), "--enforce-eager"),
        *(("--block-size", str(options.block_size)) if options.block_size else ()),
        *(("--speculative-config", json.dumps(options.speculative_config)) if options.speculative_config else ()),
        *options.more,
    ]
    environment = os.environ | {
        **cpu_environment(options.num_threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # by default, up to 32 processes
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": "",
        **options.environment,
    }
    descriptor, log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
    with os.fdopen(descriptor, "wb") as output:
        process = subprocess.Popen(
            # All processes of the server end with this one, however it ends.
            [sys.executable, "-I", str(SUPERVISOR), "", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    server = VLLMServer(options, port, process, Path(log))
    if wait:
        server.wait_until_ready()
    return server


def cpu_environment(num_threads: int) -> dict[str, str]:
    """The environment variables of vLLM's build for CPUs that set how much of the machine it uses."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(num_threads),
    }


@contextmanager
def running(*all_options: ServerOptions) -> Iterator[list[VLLMServer]]:
    """Runs servers, which start at the same time."""
    servers: list[VLLMServer] = []
    try:
        servers += (start(options, wait=False) for options in all_options)
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    install_command = commands.add_parser("install")
    install_command.add_argument("version", nargs="?", default=NEWEST)
    serve = commands.add_parser("serve")
    serve.add_argument("model")
    serve.add_argument("--port", type=int, default=8001)
    serve.add_argument("--num-threads", type=int, default=1)
    serve.add_argument("--version", default=NEWEST)
    serve.add_argument("--speculative-config", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "install":
        print(install(arguments.version))
        return
    options = ServerOptions(
        arguments.model,
        num_threads=arguments.num_threads,
        version=arguments.version,
        speculative_config=arguments.speculative_config,
    )
    server = start(options, port=arguments.port)
    print(f"{server.url}, log in {server.log}", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        server.kill()


if __name__ == "__main__":
    main()
