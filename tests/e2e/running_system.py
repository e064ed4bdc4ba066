"""`molink up` as a user starts it, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from molink.embedded import free_port

STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """A `molink up` and what it printed so far."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self) -> set[psutil.Process]:
        """Every process below it."""
        return set(psutil.Process(self.process.pid).children(recursive=True))

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Fails with what was printed when it ends before or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"`molink up` did not get there within {timeout_s:g} s; it printed:\n{self.printed}")
            time.sleep(0.05)

    def wait_until_printed(self, text: str, timeout_s: float) -> None:
        self.wait_until(lambda: text in self.printed, timeout_s)

    def stop(self) -> int:
        """Ctrl-C, then the exit code; killed if it does not stop."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"`molink up` did not stop within {STOP_TIMEOUT_S:g} s; it printed:\n{self.printed}")


def start_system(log: Path, *flags: str) -> RunningSystem:
    """`molink up` on a free port; it is not ready yet."""
    port = free_port()
    command = [sys.executable, "-m", "molink", "up", "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    return RunningSystem(port, process, log)


def survivors(processes: Iterable[psutil.Process], timeout_s: float = 5.0) -> list[str]:
    """Which of them still run after a short wait, by command line."""
    _, alive = psutil.wait_procs(list(processes), timeout=timeout_s)
    return [" ".join(process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE]
