"""Runs a command, and ends all its processes when the command or the parent process ends, however that happens.

    python supervisor.py COMMAND...

The parent keeps the other end of the standard input open. The operating system closes it when the parent ends, even if
it was killed. This process also adopts the descendants of the command whose own parents have ended, so it finds all of
them.

This program imports nothing of the project, so that it starts at once.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 5.0
"""For how long the command may clean up, for example its shared memory, before its processes are killed."""


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A signal to end this process ends the command first.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os.close(0))
    child = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    try:
        _wait_for_end(child)
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
    finally:
        _kill_descendants()
    return_code = child.wait()
    return return_code if return_code >= 0 else 128 - return_code


def _wait_for_end(child: "subprocess.Popen[bytes]") -> None:
    """Waits until the command or the parent process has ended."""
    child_end = os.pidfd_open(child.pid)
    try:
        select.select([0, child_end], [], [])
    except (OSError, ValueError):  # a signal has closed the standard input
        pass
    finally:
        os.close(child_end)


def _kill_descendants() -> None:
    """Kills all descendants. They may start others meanwhile, so this is repeated until there are none."""
    while descendants := _descendants():
        for pid in descendants:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


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
    sys.exit(main())
