"""Runs a command, and ends all its processes when the command or the caller ends, however that happens.

    python supervisor.py FOLDER COMMAND...

The caller keeps the other end of the standard input open. The operating system closes it when the caller ends, even if
it was killed. At the end, the folder is removed, if one is named: FOLDER can be empty.

There are two processes, which both adopt the descendants of the command whose own parents have ended. The inner one
watches the command and the caller. The outer one ends what is left if the inner one is killed. Ray kills the direct
children of a worker that exits, which ends the outer process but not the inner one.

This program imports nothing of the project, so that it starts at once.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 5.0
"""For how long the command may clean up, for example its shared memory, before its processes are killed."""
MAX_PAUSE_S = 1.0

libc = ctypes.CDLL(None, use_errno=True)


def main(folder: str, command: Sequence[str]) -> int:
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    inner = os.fork()
    if inner == 0:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a forked process does not inherit this
        os._exit(_supervise(folder, command))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda received, _: os.kill(inner, received))
    _, status = os.waitpid(inner, 0)
    _kill_descendants()
    _remove(folder)
    return os.waitstatus_to_exitcode(status) & 0xFF


def _supervise(folder: str, command: Sequence[str]) -> int:
    """Returns the exit code of the command."""
    stop, request_stop = os.pipe()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os.write(request_stop, b"."))
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    try:
        select.select([0, stop, os.pidfd_open(child.pid)], [], [])
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
    finally:
        _kill_descendants()
        _remove(folder)
    return_code = child.poll()
    return 128 + signal.SIGKILL if return_code is None or return_code < 0 else return_code


def _remove(folder: str) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _kill_descendants() -> None:
    """Kills all descendants. They may start others meanwhile, so this is repeated until there are none."""
    pause_s = 0.02
    while descendants := _descendants():
        for pid in descendants:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(pause_s)
        pause_s = min(MAX_PAUSE_S, 2 * pause_s)


def _descendants() -> list[int]:
    """Returns the processes below this one, except those that have ended and wait for their parent."""
    children: dict[int, list[int]] = {}
    ended = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The name of a program, in parentheses, can contain spaces.
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(parent), []).append(int(folder.name))
            if state in "ZX":
                ended.add(int(folder.name))
    descendants: list[int] = []
    remaining = [os.getpid()]
    while remaining:
        below = children.get(remaining.pop(), [])
        descendants += below
        remaining += below
    return [pid for pid in descendants if pid not in ended]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
