"""The leash: when `molink up` dies without a word, its children die with it.

A process of its own reads lines on standard input: ``+123`` puts a process group on the leash, ``-123`` takes
it off. Standard input ends when `molink up` ends, also by SIGKILL; whatever is still on the leash is then
killed. It needs nothing of the operating system but pipes, so it works alike on Linux and macOS. On Windows
it kills the processes themselves, not what they started.

It runs by path and without site-packages: it must start fast and depend on nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import TracebackType


class Leash:
    """The holder's side, for one `with` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Leash:
        self._process = subprocess.Popen(  # noqa: S603  the command is ours
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def put_on(self, pid: int) -> None:
        """From now on this process group dies with us."""
        self._write(f"+{pid}\n")

    def take_off(self, pid: int) -> None:
        """It has ended; its number may belong to somebody else soon."""
        self._write(f"-{pid}\n")

    def _write(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            # somebody who kills the leash takes the safety away, not the service
            with contextlib.suppress(OSError):
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def kill_group(pid: int) -> None:
    """Kill a process and what it started. Harmless when all have ended."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            os.kill(pid, signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGKILL)


def _watch() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    on_leash: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line.startswith("+"):
            on_leash.add(pid)
        else:
            on_leash.discard(pid)
    for pid in on_leash:
        kill_group(pid)


if __name__ == "__main__":
    _watch()
