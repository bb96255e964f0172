"""Stands for a Python interpreter with vLLM. Its server is the scripted one, and has arguments of its own.

It starts a second process, as vLLM does, which does not end by itself.
"""

import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.parse.engines.remote.fake_vllm import FakeVLLM

OPTIONS = {"--model", "--uds", "--served-model-name", "--max-model-len", "--dtype", "--fail-if-exists", "--start-delay"}


def write_executable(folder: Path) -> str:
    """Returns the path of the interpreter."""
    executable, root = folder / "python", Path(__file__).parents[4]
    executable.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} {__file__} "$@"\n')
    executable.chmod(0o755)
    return str(executable)


def main(arguments: list[str]) -> None:
    program, *rest = arguments
    if program.endswith("argument_check.py"):
        check(rest[1:])
        return
    assert (program, rest[0]) == ("-m", "vllm.entrypoints.openai.api_server"), arguments
    options = dict(zip(rest[1::2], rest[2::2], strict=True))
    print("(APIServer pid=1) INFO 12-01 06:00:00 [entry.py:1] starting", flush=True)
    check(rest[1:])
    if Path(options.get("--fail-if-exists", "/nonexistent")).exists():
        print("(EngineCore pid=2) ERROR 12-01 06:00:01 [core.py:1] ValueError: No memory is left", flush=True)
        print("(EngineCore pid=2) ERROR 12-01 06:00:01 [core.py:2] the process ends", flush=True)
        sys.exit(1)
    subprocess.Popen(["sleep", "1000"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    FakeVLLM(
        options["--model"],
        name=options["--served-model-name"],
        max_model_len=int(options["--max-model-len"]),
        socket_path=options["--uds"],
    )
    threading.Event().wait()


def check(arguments: list[str]) -> None:
    unknown = [name for name in arguments[::2] if name not in OPTIONS]
    if unknown:
        print(f"usage: vllm serve\nvllm serve: error: unrecognized arguments: {' '.join(unknown)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
