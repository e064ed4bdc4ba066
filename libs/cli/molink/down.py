"""`molink down`: stops a running `molink up`, found by its lock file."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from molink.folders import locks_folder
from molink.lock import Holder, current_holder, holders
from molink_common.errors import MolinkError
from molink_common.folders import cache_folder

_STOP_TIMEOUT_S = 40.0
_LOOK_AGAIN_S = 0.1


def down(
    port: Annotated[int | None, typer.Option(help="Stop only the one on this port. Default: all.")] = None,
) -> None:
    """Stop what `molink up` started on this machine."""
    folder = locks_folder(cache_folder())
    running = [holder for holder in holders(folder) if port in (None, holder.port)]
    if not running:
        print("no molink up is running" + (f" on port {port}" if port is not None else ""))
    for holder in running:
        stop(folder, holder)
        print(f"stopped {holder.url} (pid {holder.pid})")


def stop(folder: Path, holder: Holder) -> None:
    """Ask a `molink up` to stop and wait until it has.

    Raises:
        MolinkError: it belongs to somebody else, or does not stop in time.
    """
    try:
        # the lock is held, so the process lives and the number is its own
        os.kill(holder.pid, signal.SIGTERM)
    except PermissionError as error:
        raise MolinkError(f"pid {holder.pid} belongs to another user") from error
    except ProcessLookupError:
        return
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while current_holder(folder, holder.port) == holder:
        if time.monotonic() > deadline:
            raise MolinkError(f"pid {holder.pid} still runs after {_STOP_TIMEOUT_S:g} s; kill it with kill -9")
        # a process that is not our child can only be looked for
        time.sleep(_LOOK_AGAIN_S)
