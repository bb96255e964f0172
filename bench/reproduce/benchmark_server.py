"""Starts the servers of a plan, waits until they are ready, and ends them with all their processes."""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.reproduce.plan import ServerPlan

POLL_S = 0.25
STOP_TIMEOUT_S = 90.0  # Ray ends its processes one after the other
KILL_TIMEOUT_S = 10.0
MAX_REASON_LENGTH = 800
NUM_REASON_LINES = 3
# vLLM prefixes each line of its log with the process, the time and the place in the code.
LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\] ?)?")
ERROR_LINE = re.compile(r"\berror: |\w(Error|Exception)\b:|^python -m deployments: ")


class ServerNotStarted(RuntimeError):
    """The server does not start. The message quotes its log."""


class BenchmarkServer:
    """A server that is started when it is first needed, and that ends with the context.

    If it does not start, it is not started again.
    """

    def __init__(self, plan: ServerPlan, log: Path) -> None:
        self.plan, self.log = plan, log
        self.ready_after_s: float | None = None
        self.failure: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "BenchmarkServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ensure_running(self) -> None:
        """Raises ServerNotStarted if the server does not run."""
        if self.failure is None and self._process is None:
            self._start()
        elif self.failure is None and self._process is not None and self._process.poll() is not None:
            self.failure = f"the server has ended (exit code {self._process.returncode}): {self._reason()}"
        if self.failure is not None:
            raise ServerNotStarted(self.failure)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.plan.name,
            "command": self.plan.shell_command,
            "ready_after_s": self.ready_after_s,
            "failure": self.failure,
            "log": f"logs/{self.log.name}",
        }

    def stop(self) -> None:
        """Ends the server and the processes that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
        finally:  # also if the user does not want to wait
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_TIMEOUT_S)

    def _start(self) -> None:
        if is_port_used(self.plan.port):
            self.failure = f"port {self.plan.port} is in use: choose another one with --port"
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            with self.log.open("wb") as output:
                self._process = subprocess.Popen(
                    self.plan.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment(os.environ),
                    start_new_session=True,  # Ctrl-C reaches this program, which ends the server itself
                )
        except OSError as error:
            self.failure = f"the server cannot be started: {error}"
            return
        while not self._responds():
            if self._process.poll() is not None:
                self.failure = f"the server does not start (exit code {self._process.returncode}): {self._reason()}"
                break
            if time.monotonic() - started > self.plan.start_timeout_s:
                self.failure = f"the server is not ready after {self.plan.start_timeout_s:g} s: {self._reason()}"
                break
            time.sleep(POLL_S)
        else:
            self.ready_after_s = round(time.monotonic() - started, 1)
            return
        self.stop()

    def _environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        remaining = {name: value for name, value in environment.items() if name not in self.plan.removed_variables}
        return remaining | dict(self.plan.environment)

    def _responds(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError), opener.open(f"{self.plan.url}{self.plan.health_path}", timeout=5) as response:
            return bool(response.status == 200)
        return False

    def _reason(self) -> str:
        """Returns the lines of the log that tell why the server has ended, or its last ones."""
        text = self.log.read_text(errors="replace")
        lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if ERROR_LINE.search(line)]
        return " | ".join(list(dict.fromkeys(errors or lines))[-NUM_REASON_LINES:])[-MAX_REASON_LENGTH:]


def is_port_used(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
