"""One `molink up` a port: a lock file that names the process and its URL.

The lock is the operating system's, on the open file: it ends with the process that holds it, however that
ends, so a file that a killed run left behind is taken over without asking.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from molink_common.errors import MolinkError

_LOCK_BYTE = 1 << 20
"""Windows locks ranges of bytes: one far behind the text, so that others can read the text."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who serves a port."""

    pid: int
    port: int
    url: str


class AlreadyRunning(MolinkError):
    """Another `molink up` serves this port."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(
            f"molink up is already running at {holder.url} (pid {holder.pid}); "
            f"stop it with `molink down --port {holder.port}`, or choose another --port"
        )
        self.holder = holder


def lock_file(folder: Path, port: int) -> Path:
    """The lock file of a port."""
    return folder / f"up-{port}.json"


@contextlib.contextmanager
def hold(folder: Path, holder: Holder) -> Iterator[None]:
    """Hold the port's lock; the file is gone afterwards.

    Raises:
        AlreadyRunning: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = lock_file(folder, holder.port)
    file = open_locked(path)
    if file is None:
        raise AlreadyRunning(_read(path) or Holder(pid=0, port=holder.port, url=holder.url))
    with file:
        file.truncate()
        file.write(json.dumps({"pid": holder.pid, "port": holder.port, "url": holder.url}))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def current_holder(folder: Path, port: int) -> Holder | None:
    """Who serves the port now. A stale file counts as nobody."""
    path = lock_file(folder, port)
    if not path.exists():
        return None
    file = open_locked(path)
    if file is None:
        return _read(path)
    with file, contextlib.suppress(OSError):
        path.unlink()
    return None


def holders(folder: Path) -> list[Holder]:
    """Everybody who runs, by port."""
    ports = sorted(int(path.stem[3:]) for path in folder.glob("up-*.json") if path.stem[3:].isdigit())
    return [holder for port in ports if (holder := current_holder(folder, port)) is not None]


def open_locked(path: Path) -> IO[str] | None:
    """The file, open and locked, or None if somebody else holds it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
        if not _try_lock(file):
            file.close()
            return None
        # between opening and locking, its last owner may have removed the file: then this one has no name
        with contextlib.suppress(FileNotFoundError):
            if _has_name(file, path):
                return file
        file.close()


def _has_name(file: IO[str], path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415  only there

            file.seek(_LOCK_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl  # noqa: PLC0415  not on Windows

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _read(path: Path) -> Holder | None:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Holder(pid=int(body["pid"]), port=int(body["port"]), url=str(body["url"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
