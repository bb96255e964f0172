"""A vLLM server as a child process: how it starts, what it prints, and what happens when it ends."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(f"{__name__}.log")
logger = logging.getLogger(__name__)

SUPERVISOR = Path(__file__).with_name("supervisor.py")
SOCKET_NAME = "vllm.sock"
NUM_LAST_LINES = 200  # of the log, in which the reason of a failure is found
NUM_REASONS = 3
POLL_S = 0.1
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 5.0
MAX_FAILED_STARTS = 3  # one after the other; more would not help
RESTART_DELAY_S = 2.0  # a GPU may not have freed the memory of the killed process yet
STOP_TIMEOUT_S = 15.0
LOG_TIMEOUT_S = 1.0  # for the last lines of a process that has ended


class ServerFailed(ValueError):
    """The server does not start. The message quotes its log."""


class ServerProcess:
    """One run of the server, with all processes that it starts."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], socket_path: Path) -> None:
        self._socket_path = socket_path
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        socket_path.parent.mkdir(mode=0o700, exist_ok=True)  # an earlier process has removed it
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(SUPERVISOR), str(socket_path.parent), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C reaches the replica, which ends the server itself
        )
        self._reader = threading.Thread(target=self._copy_log, name="vLLM log", daemon=True)
        self._reader.start()

    def wait(self, timeout_s: float) -> bool:
        """Returns whether the server ends within this time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self._process.poll() is not None

    def responds(self) -> bool:
        """Returns whether the server says that it is healthy."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(HEALTH_TIMEOUT_S)
            connection.connect(str(self._socket_path))
            connection.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return connection.recv(64).split(b" ")[1:2] == [b"200"]
        return False

    def wait_until_ready(self, timeout_s: float) -> None:
        """Raises ServerFailed, with what the server has printed, if it ends or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while not self.responds():
            if self.wait(POLL_S):
                raise ServerFailed(f"vLLM does not start (exit code {self._process.returncode}): {self.reason()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"vLLM is not ready after {timeout_s:g} s: {self.reason()}")

    def reason(self) -> str:
        """Returns the lines of the log that tell why the server has ended, or its last ones."""
        self._reader.join(LOG_TIMEOUT_S)
        lines = [_without_prefix(line) for line in list(self._last_lines)]
        errors = [line for line in lines if re.search(r"\berror: |\w(Error|Exception)\b:", line)]
        return " | ".join(list(dict.fromkeys(errors or lines))[-NUM_REASONS:])

    def stop(self) -> None:
        """Ends the server and all its processes."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # the supervisor waits for this
        if not self.wait(STOP_TIMEOUT_S):
            self._process.kill()
        # All processes have the log open. If the outer supervisor was killed, the inner one still ends them.
        self._reader.join(STOP_TIMEOUT_S)
        if self._reader.is_alive():  # both supervisors were killed
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _copy_log(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last_lines.append(text)
                    log.info("%s", text)


class SupervisedServer:
    """A server that is started again when it ends or hangs.

    Its address, a Unix socket, stays the same. Nobody else on the machine can use it.
    """

    def __init__(
        self,
        command: Callable[[Path], Sequence[str]],
        environment: Mapping[str, str],
        *,
        start_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        """`command` returns the command of a server that listens on a socket."""
        self.socket_path = Path(tempfile.mkdtemp(prefix="parse-serve-vllm-")) / SOCKET_NAME
        self.num_restarts = 0
        self.failure: str | None = None
        """Why the server cannot be started again."""
        self._command, self._environment = list(command(self.socket_path)), environment
        self._start_timeout_s, self._stall_timeout_s = start_timeout_s, stall_timeout_s
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._process = self._start()
        try:
            self._process.wait_until_ready(start_timeout_s)
        except BaseException:
            self.close()
            raise
        self._monitor_thread = threading.Thread(target=self._monitor, name="vLLM monitor", daemon=True)
        self._monitor_thread.start()

    def close(self) -> None:
        with self._starting:
            self._closing.set()
        self._process.stop()

    def _start(self) -> ServerProcess:
        return ServerProcess(self._command, self._environment, self.socket_path)

    def _monitor(self) -> None:
        try:
            while not self._closing.is_set() and self.failure is None:
                reason = self._wait_for_failure()
                if not self._closing.is_set():
                    self._restart(reason)
        except Exception as error:  # otherwise nobody would notice that the server is no longer watched
            logger.exception("the server is no longer supervised")
            self.failure = f"vLLM is no longer supervised: {error}"

    def _wait_for_failure(self) -> str:
        """Waits until the server has ended, or has not responded for too long. Returns which one it is."""
        last_response = time.monotonic()
        while not self._process.wait(HEALTH_PERIOD_S):
            if self._process.responds():
                last_response = time.monotonic()
            elif time.monotonic() - last_response > self._stall_timeout_s:
                return f"does not respond for {self._stall_timeout_s:g} s"
        return "has ended"

    def _restart(self, reason: str) -> None:
        failure = ""
        for _ in range(MAX_FAILED_STARTS):
            logger.error("vLLM %s, and is started again: %s", reason, self._process.reason())
            self._process.stop()
            self._closing.wait(RESTART_DELAY_S)
            with self._starting:
                if self._closing.is_set():
                    return
                self._process = self._start()
            self.num_restarts += 1
            try:
                self._process.wait_until_ready(self._start_timeout_s)
                return
            except ServerFailed as error:
                reason, failure = "does not start", str(error)
        self._process.stop()
        self.failure = failure


def _without_prefix(line: str) -> str:
    """Returns a line of vLLM's log without the process, the time and the place in the code."""
    return re.sub(r"^(\(\w+ pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\] ?)?", "", line).strip()
