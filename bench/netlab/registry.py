"""Numbers of the laboratories on this machine, and what killed ones left behind.

A running laboratory holds the lock of its number. The kernel gives the lock back when the process ends, however it
ends, so a number whose lock can be taken belongs to nobody alive, and only then is what bears it removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.netlab.plan import MOST_LABS, PREFIX, device_prefix, namespace_prefix
from molink_common.errors import MolinkError

_LOCKS = Path("/run/molink-netlab")
_NAMESPACES = Path("/var/run/netns")
_DEVICES = Path("/sys/class/net")
_IP_TIMEOUT_S = 20.0


class LabError(MolinkError):
    """The laboratory could not be made or changed. The message carries the words of the tool that refused."""


def run_tool(*command: str) -> str:
    """What a tool prints. It is no member of our process group, so Ctrl-C does not end it half way.

    Raises:
        LabError: it is not installed, failed, or took longer than 20 s.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IP_TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise LabError(f"{command[0]} is not installed; the network laboratory needs iproute2 and procps") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(command)} took longer than {_IP_TIMEOUT_S:g} s") from None
    if result.returncode != 0:
        raise LabError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


@contextlib.contextmanager
def claim_number() -> Iterator[int]:
    """A number that no living laboratory has, without remains; kept, and its namespaces removed, at the end.

    Raises:
        LabError: all are taken, or the machine does not let us.
    """
    for number in range(MOST_LABS):
        with _lock(number) as is_ours:
            if is_ours:
                _remove(number)
                try:
                    yield number
                finally:
                    _remove(number)
                return
    raise LabError(f"{MOST_LABS} laboratories run on this machine")


def clean() -> list[str]:
    """Remove what killed laboratories left behind; gives the names of the namespaces removed.

    Raises:
        LabError
    """
    removed: list[str] = []
    for number in range(MOST_LABS):
        if (_LOCKS / f"{number}.lock").exists() or namespaces_of(number) or _devices(number):
            with _lock(number) as is_ours:
                if is_ours:
                    removed += _remove(number)
    return removed


@contextlib.contextmanager
def _lock(number: int) -> Iterator[bool]:
    """Whether the number's lock is ours for the block."""
    try:
        _LOCKS.mkdir(mode=0o755, exist_ok=True)
        file = os.open(_LOCKS / f"{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except PermissionError:
        raise LabError("the network laboratory makes network namespaces: it must be run by root") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(file)


def namespaces_of(number: int) -> list[str]:
    """The names of the namespaces that bear a laboratory's number now."""
    return sorted(path.name for path in _NAMESPACES.glob(f"{namespace_prefix(number)}*"))


def _devices(number: int) -> list[str]:
    return sorted(path.name for path in _DEVICES.glob(f"{device_prefix(number)}*"))


def _remove(number: int) -> list[str]:
    """Everything that bears the number: processes, then devices, then namespaces."""
    assert PREFIX in namespace_prefix(number)
    names = namespaces_of(number)
    for name in names:
        for pid in run_tool("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    for device in _devices(number):
        # a namespace dies in its own time, and its devices with it: this one may be gone by now
        with contextlib.suppress(LabError):
            run_tool("ip", "link", "delete", device)
    for name in names:
        run_tool("ip", "netns", "delete", name)
    return names
