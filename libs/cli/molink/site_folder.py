"""Which broker of a site runs on this machine, and who still uses it. Locks of the operating system, no clocks.

Below the cache folder, ``sites/<site>/``:

    broker.json   locked by the site's broker as long as it runs; says where it serves and what it joins
    users         locked, shared, by each worker that uses it; a broker that workers started ends when it gets the
                  exclusive lock, so it stays while anybody uses it and goes with the last one, however that one ends
    start         locked while a worker looks for the broker and starts it: two that come at once start one
    broker.log    what a broker that a worker started has to say
    nats.conf     what its nats-server was told
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from molink.lock import open_locked
from molink_common.errors import MolinkError, SettingsError


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """The broker of a site on this machine."""

    pid: int
    url: str
    """Where clients of this machine reach it."""
    joins: str
    """What it joins, as `BrokerPlan.joins` says it."""


class SiteTaken(MolinkError):
    """Another broker of this site runs on this machine."""


def site_folder(cache: Path, site: str) -> Path:
    """The folder of a site; made if need be, for this user only."""
    folder = cache / "sites" / site
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@contextlib.contextmanager
def hold_site(folder: Path, site: str) -> Iterator[IO[str]]:
    """Be the broker of the site on this machine; gives the file that `announce` writes.

    Raises:
        SiteTaken: another process is.
    """
    path = folder / "broker.json"
    file = open_locked(path)
    if file is None:
        running = _read(path)
        where = "" if running is None else f" at {running.url} (pid {running.pid})"
        raise SiteTaken(f"a broker of site {site} runs on this machine already{where}; workers find it by --site")
    with file:
        file.truncate()
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def announce(file: IO[str], broker: RunningBroker) -> None:
    """From now on workers find this broker."""
    file.write(json.dumps(asdict(broker)))
    file.flush()


def running_broker(folder: Path) -> RunningBroker | None:
    """The broker that runs now, once it has announced itself."""
    path = folder / "broker.json"
    if not path.exists():
        return None
    file = open_locked(path)
    if file is None:
        return _read(path)
    with file, contextlib.suppress(OSError):
        path.unlink()
    return None


@contextlib.contextmanager
def counted_as_user(folder: Path) -> Iterator[None]:
    """While the block runs, a broker that workers started stays. Waits for one that is just stopping (seconds)."""
    with _locked(folder / "users", exclusive=False):
        yield


def wait_until_unused(folder: Path) -> IO[bytes]:
    """Block until nobody uses the broker; nobody can begin to, until the file that this gives is closed."""
    file = (folder / "users").open("ab")
    _lock(file, exclusive=True)
    return file


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[None]:
    """One at a time: look for the site's broker, start it if there is none. Waits as long as a start takes."""
    with _locked(folder / "start", exclusive=True):
        yield


@contextlib.contextmanager
def _locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    with path.open("ab") as file:
        _lock(file, exclusive=exclusive)
        yield


def _lock(file: IO[bytes], *, exclusive: bool) -> None:
    if sys.platform == "win32":
        raise SettingsError("--hub: Windows has no shared locks; run `molink broker` here and give its --nats-url")
    import fcntl  # noqa: PLC0415  not on Windows

    # Python hands open files on to no child, so nobody holds this lock but us
    fcntl.flock(file.fileno(), fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


def _read(path: Path) -> RunningBroker | None:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return RunningBroker(pid=int(body["pid"]), url=str(body["url"]), joins=str(body["joins"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
