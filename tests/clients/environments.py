"""Environments of the clients: every client is installed separately, with the pinned versions of its lock file."""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE = Path.home() / ".cache" / "parse-serve" / "clients"
LOCKS = Path(__file__).parent / "locks"
NODE_LOCKS = LOCKS / "node"


class ClientUnavailable(RuntimeError):
    """The client cannot be installed on this machine."""


def install(name: str) -> Path:
    """Returns the Python interpreter of an environment, which is created at the first call."""
    lock_file = LOCKS / f"{name}.txt"
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folder = CACHE / f"{name}-{python}-{_digest(lock_file)}"

    def create() -> None:
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([*_pip(folder), "install", "--quiet", "--requirement", str(lock_file)])

    _create_once(folder, create)
    return folder / "bin" / "python"


def install_node() -> Path:
    """Returns the folder `node_modules` of all clients that run in Node."""
    if shutil.which("npm") is None:
        raise ClientUnavailable("npm is not installed")
    folder = CACHE / f"node-{_digest(NODE_LOCKS / 'package-lock.json')}"

    def create() -> None:
        folder.mkdir(exist_ok=True)
        for file in NODE_LOCKS.iterdir():
            shutil.copy(file, folder)
        _run(["npm", "ci", "--no-audit", "--no-fund", "--prefix", str(folder)])

    _create_once(folder, create)
    return folder / "node_modules"


def lock(name: str, packages: Sequence[str]) -> Path:
    """Writes the lock file of an environment with the newest versions of its packages."""
    folder = CACHE / f"{name}-lock"
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([*_pip(folder), "install", "--quiet", *packages])
    versions = subprocess.run([*_pip(folder), "freeze"], capture_output=True, text=True, check=True).stdout
    lock_file = LOCKS / f"{name}.txt"
    lock_file.write_text(versions.replace("+cpu", ""))
    shutil.rmtree(folder)
    return lock_file


def lock_node(packages: Sequence[str]) -> Path:
    """Writes the lock file of all clients that run in Node with the newest versions of their packages."""
    NODE_LOCKS.mkdir(exist_ok=True)
    for file in NODE_LOCKS.iterdir():
        file.unlink()
    (NODE_LOCKS / "package.json").write_text('{\n  "name": "clients",\n  "private": true\n}\n')
    # The addresses of the packages are those of a registry, which every machine configures for itself.
    options = ["--package-lock-only", "--save-exact", "--omit-lockfile-registry-resolved", "--no-audit", "--no-fund"]
    _run(["npm", "install", *options, "--prefix", str(NODE_LOCKS), *packages])
    return NODE_LOCKS / "package-lock.json"


def locked_version(name: str, package: str) -> str:
    """Returns the version of a package in a lock file."""
    normalized = package.partition("[")[0].lower().replace("_", "-")
    for line in (LOCKS / f"{name}.txt").read_text().splitlines():
        locked, _, version = line.partition("==")
        if locked.lower().replace("_", "-") == normalized:
            return version
    raise ValueError(f"the lock file of {name} has no {package}")


def _create_once(folder: Path, create: Callable[[], None]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be installing it
        if not (folder / "installed").exists():
            create()
            (folder / "installed").touch()


def _pip(folder: Path) -> list[str]:
    return [str(folder / "bin" / "python"), "-m", "pip"]


def _digest(lock_file: Path) -> str:
    return hashlib.sha256(lock_file.read_bytes()).hexdigest()[:12]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClientUnavailable(f"{' '.join(command[:6])} failed: {' '.join(done.stderr.split())[-300:]}")
