"""`make monitoring`: Prometheus beside a service on this machine, and Grafana where it is installed, until Ctrl-C."""

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
NEARBY = 20  # ports that are tried behind the one that was asked for
LAST_PORT = 65535
DIRECTLY = build_opener(ProxyHandler({}))  # a proxy of the environment knows nothing of this machine
STARTED_S = 60.0
STOPPED_S = 20.0
NO_PROMETHEUS = """Prometheus is not installed. On Debian or Ubuntu, as root:
  apt-get install --no-install-recommends prometheus
Elsewhere: https://prometheus.io/download, and `prometheus` in the PATH."""
NO_GRAFANA = f"""Grafana is not installed here. In one that you have: add the above as a data source of the type
Prometheus, then Dashboards, New, Import, for each of {DASHBOARDS}/*.json"""


class NotStarting(RuntimeError):
    """Why there is nothing to look at."""


@dataclass(frozen=True)
class Program:
    name: str
    command: Sequence[str]
    url: str
    ready: str  # the path that answers once it is
    log: Path
    settings: Mapping[str, str] = field(default_factory=dict)  # its environment, besides ours


def prometheus(config: Path, data: Path, port: int) -> Program:
    found = shutil.which("prometheus")
    if not found:
        raise NotStarting(NO_PROMETHEUS)
    command = [
        found,
        f"--config.file={config}",
        f"--storage.tsdb.path={data / 'prometheus'}",
        "--storage.tsdb.retention.time=14d",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--log.level=warn",
    ]
    return Program("Prometheus", command, f"http://{LOOPBACK}:{port}", "/-/ready", data / "prometheus.log")


def grafana(source: str, data: Path, port: int) -> Program | None:
    """For everybody on this machine to look at, and nobody to change."""
    if found := shutil.which("grafana"):
        command = [found, "server"]
    elif found := shutil.which("grafana-server"):
        command = [found]
    else:
        return None
    home = Path("/usr/share/grafana")  # where its packages have it; elsewhere it knows by itself
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
        "PARSE_PROMETHEUS": source,
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


def free_port(wanted: int) -> int:
    """That one, or the next that nobody has."""
    last = min(wanted + NEARBY - 1, LAST_PORT)
    for port in range(max(wanted, 1), last + 1):  # 0 would be any port, and not known to us
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise NotStarting(f"no port is free from {wanted} to {last}" if wanted <= last else f"there is no port {wanted}")


@contextmanager
def alone_in(data: Path) -> Iterator[None]:
    """Debian's Prometheus takes no lock of its own: two of them would spoil what each other records."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / "lock").open("w")
    except OSError as error:
        raise NotStarting(f"nothing can be recorded in {data}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotStarting(f"another one records in {data}: stop it, or choose another folder (--data)") from None
        yield


class Running:
    """A program, from its start to its end; leave the context to stop it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with program.log.open("ab") as log:
            # In a session of its own, Ctrl-C does not reach it: it is stopped by us, in order.
            self.process = subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **program.settings},
                start_new_session=True,
            )

    def __enter__(self) -> "Running":
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
            raise NotStarting(f"{self.program.name} has ended ({code}); {self.program.log} says:\n{last}")

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + STARTED_S
        while time.monotonic() < until:
            self.check()
            try:
                with DIRECTLY.open(self.program.url + self.program.ready, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (URLError, TimeoutError, ConnectionError):
                pass
            time.sleep(0.1)
        raise NotStarting(f"{self.program.name} is not ready after {STARTED_S:g} s: see {self.program.log}")

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOPPED_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(signum: int, _: object) -> None:
    for each in STOPPING:  # impatience must not leave anything running
        signal.signal(each, lambda *_: None)
    raise KeyboardInterrupt


def run(port: int, grafana_port: int, data: Path, config: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(alone_in(data))
        source = stack.enter_context(Running(prometheus(config, data, free_port(port))))
        running = [source]
        tell(f"Prometheus  {source.program.url}   (what it scrapes: {source.program.url}/targets)")
        if shown := grafana(source.program.url, data, free_port(grafana_port)):
            running.append(stack.enter_context(Running(shown)))
            tell(f"Grafana     {shown.url}")
        else:
            tell(NO_GRAFANA)
        tell("Until Ctrl-C.")
        while True:
            for one in running:
                one.check()
            time.sleep(0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring", description=__doc__)
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus, or the next that is free")
    parser.add_argument("--grafana-port", type=int, default=3000, help="of Grafana, or the next that is free")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder for what is recorded")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of Prometheus")
    given = parser.parse_args(arguments)
    for each in STOPPING:
        signal.signal(each, stop)  # a shell's background jobs would have some of them ignored
    try:
        run(given.port, given.grafana_port, given.data.resolve(), given.config.resolve())
    except KeyboardInterrupt:
        tell("Stopped.")
    except NotStarting as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
