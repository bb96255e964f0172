"""The environment of the evaluation harnesses lm-eval and evalplus.

They need other versions of some packages than this project, so they get a virtual environment in the cache folder. The
lock file pins the packages that the programs in `bench/tasks/programs/` import, and no others: torch is not among them.
"""

import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.tasks.task import TaskUnavailable

CACHE = Path.home() / ".cache" / "parse-serve"
LOCK_FILE = Path(__file__).with_name("harnesses.lock")


def install() -> Path:
    """Returns the Python interpreter of the environment, which is created at the first call."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folder = CACHE / f"evaluation-{version}-{hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be installing it
        if not (folder / "installed").exists():
            print("installing lm-eval and evalplus, which takes about a minute", file=sys.stderr, flush=True)
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            # lm-eval has thousands of modules, of which few are imported. So they are not compiled in advance.
            _run([*pip, "--no-deps", "--no-compile", "--requirement", str(LOCK_FILE)])
            (folder / "installed").touch()
    return folder / "bin" / "python"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-300:]
        raise TaskUnavailable(f"lm-eval and evalplus cannot be installed: {reason}")
