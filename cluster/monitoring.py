"""Runs Prometheus for a service on this machine, until Ctrl-C.

It also runs Grafana if Grafana is installed. `make monitoring` calls this program.
"""

import argparse
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

HERE = Path(__file__).parent
CONFIG = HERE / "prometheus" / "prometheus.yml"
DASHBOARDS = HERE / "grafana" / "dashboards"
PROVISIONING = HERE / "grafana" / "provisioning"
DATA = HERE.parent / ".monitoring"
LOOPBACK = "127.0.0.1"
MAX_PORT_ATTEMPTS = 20  # consecutive ports to try, from the requested one
LAST_PORT = 65535
NO_PROXY_OPENER = build_opener(ProxyHandler({}))  # a proxy set in the environment cannot reach this machine
STARTUP_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
NO_PROMETHEUS = """Prometheus is not installed. On Debian or Ubuntu, as root:
  apt-get install --no-install-recommends prometheus
On other systems, download it from https://prometheus.io/download and put `prometheus` into the PATH."""
NO_GRAFANA = f"""Grafana is not installed here. To use another Grafana, add the address above as a data source of type
Prometheus. Then choose Dashboards, New, Import for each of {DASHBOARDS}/*.json"""


class StartupError(RuntimeError):
    """Raised if monitoring cannot be started, or if one of its programs has ended."""


@dataclass(frozen=True)
class Program:
    name: str
    command: Sequence[str]
    url: str
    ready_path: str  # the path that responds once the program is ready
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)  # additional environment variables


def prometheus_program(config: Path, data: Path, port: int) -> Program:
    executable = shutil.which("prometheus")
    if not executable:
        raise StartupError(NO_PROMETHEUS)
    command = [
        executable,
        f"--config.file={config}",
        f"--storage.tsdb.path={data / 'prometheus'}",
        "--storage.tsdb.retention.time=14d",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--log.level=warn",
    ]
    return Program("Prometheus", command, f"http://{LOOPBACK}:{port}", "/-/ready", data / "prometheus.log")


def grafana_program(prometheus_url: str, data: Path, port: int) -> Program | None:
    """Returns a Grafana that everyone on this machine can view, but not change.

    Returns None if Grafana is not installed.
    """
    if executable := shutil.which("grafana"):
        command = [executable, "server"]
    elif executable := shutil.which("grafana-server"):
        command = [executable]
    else:
        return None
    home = Path("/usr/share/grafana")  # packages install it here; other installations know their own folder
    settings = {
        "GF_PATHS_DATA": str(data / "grafana"),
        "GF_PATHS_LOGS": str(data / "grafana" / "log"),
        "GF_PATHS_PLUGINS": str(data / "grafana" / "plugins"),
        "GF_PATHS_PROVISIONING": str(PROVISIONING),
        "GF_SERVER_HTTP_ADDR": LOOPBACK,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_AUTH_BASIC_ENABLED": "false",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(DASHBOARDS / "overview.json"),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        "PARSE_PROMETHEUS": prometheus_url,
        "PARSE_DASHBOARDS": str(DASHBOARDS),
    }
    return Program(
        "Grafana",
        [*command, *(["--homepath", str(home)] if home.is_dir() else [])],
        f"http://{LOOPBACK}:{port}",
        "/api/health",
        data / "grafana.log",
        settings,
    )


def find_free_port(preferred: int) -> int:
    """Returns the preferred port, or the next free one."""
    last = min(preferred + MAX_PORT_ATTEMPTS - 1, LAST_PORT)
    for port in range(max(preferred, 1), last + 1):  # 0 would bind to a random port
        with socket.socket() as test_socket:
            test_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                test_socket.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise StartupError(
        f"no port is free from {preferred} to {last}" if preferred <= last else f"there is no port {preferred}"
    )


@contextmanager
def lock_data(data: Path) -> Iterator[None]:
    """Locks the folder during the block.

    Debian's Prometheus takes no lock, and two of them would damage each other's data.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / "lock").open("w")
    except OSError as error:
        raise StartupError(f"data cannot be stored in {data}: {error.strerror}; set another folder (--data)") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(
                f"another monitoring program already uses {data}: stop it, or set another folder (--data)"
            ) from None
        yield


class RunningProgram:
    """A started program. Leaving the context stops it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with program.log.open("ab") as log:
            # The program gets its own session. Ctrl-C then does not reach it, and `_stop` stops it.
            self.process = subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **program.environment},
                start_new_session=True,
            )

    def __enter__(self) -> "RunningProgram":
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def check(self) -> None:
        if (code := self.process.poll()) is not None:
            last = "\n".join(self.program.log.read_text(errors="replace").splitlines()[-5:])
            raise StartupError(f"{self.program.name} has ended ({code}); the end of {self.program.log}:\n{last}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check()
            try:
                with NO_PROXY_OPENER.open(self.program.url + self.program.ready_path, timeout=2) as response:
                    if response.status == 200:
                        return
            except (URLError, TimeoutError, ConnectionError):
                pass
            time.sleep(0.1)
        raise StartupError(f"{self.program.name} is not ready after {STARTUP_TIMEOUT_S:g} s: see {self.program.log}")

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(signum: int, _: object) -> None:
    for stop_signal in STOP_SIGNALS:  # a second signal must not interrupt the shutdown
        signal.signal(stop_signal, lambda *_: None)
    raise KeyboardInterrupt


def run(port: int, grafana_port: int, data: Path, config: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(lock_data(data))
        prometheus = stack.enter_context(RunningProgram(prometheus_program(config, data, find_free_port(port))))
        running = [prometheus]
        print_now(f"Prometheus  {prometheus.program.url}   (scraped targets: {prometheus.program.url}/targets)")
        if grafana := grafana_program(prometheus.program.url, data, find_free_port(grafana_port)):
            running.append(stack.enter_context(RunningProgram(grafana)))
            print_now(f"Grafana     {grafana.url}")
        else:
            print_now(NO_GRAFANA)
        print_now("Press Ctrl-C to stop.")
        while True:
            for program in running:
                program.check()
            time.sleep(0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring", description=__doc__)
    parser.add_argument(
        "--port", type=int, default=9090, help="the port of Prometheus; if it is taken, the next free one is used"
    )
    parser.add_argument(
        "--grafana-port", type=int, default=3000, help="the port of Grafana; if it is taken, the next free one is used"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="the folder in which data is stored")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the configuration of Prometheus")
    args = parser.parse_args(arguments)
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, stop)  # explicit, because a shell makes background jobs ignore some signals
    try:
        run(args.port, args.grafana_port, args.data.resolve(), args.config.resolve())
    except KeyboardInterrupt:
        print_now("Stopped.")
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def print_now(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
