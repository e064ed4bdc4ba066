"""Where `molink up` keeps things between runs: below the user's cache folder, or below ``MOLINK_CACHE``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

KEPT_RUNS = 5
"""How many folders of logs stay behind for each port."""


def locks_folder(cache: Path) -> Path:
    """Where the lock files lie, one for each port that a `molink up` serves."""
    return cache / "locks"


def new_run_folder(cache: Path, port: int, now_s: float | None = None) -> Path:
    """A fresh folder for this run's logs; the oldest of the same port are dropped.

    The caller holds the port's lock, so no other run on this port still writes into the old ones.
    """
    runs = cache / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    earlier = sorted(runs.glob(f"*-port-{port}"))
    for old in earlier[: max(0, len(earlier) - KEPT_RUNS + 1)]:
        shutil.rmtree(old, ignore_errors=True)
    started = time.strftime("%Y%m%d-%H%M%S", time.localtime(now_s))
    number = 0
    while True:
        folder = runs / (f"{started}-port-{port}" if number == 0 else f"{started}.{number}-port-{port}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
