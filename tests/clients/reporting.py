"""What a client's program needs: where the server is, and one JSON line for each check.

Only the standard library, because it is imported in every client's own environment. The runner sets CLIENT_BASE_URL
(it ends with /v1), CLIENT_MODEL and CLIENT_API_KEY; the names of single checks may follow on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

BASE_URL = os.environ.get("CLIENT_BASE_URL", "http://127.0.0.1:8000/v1")
MODEL = os.environ.get("CLIENT_MODEL", "demo")
API_KEY = os.environ.get("CLIENT_API_KEY", "unused")

#: Any single request; a busy machine of two cores needs a while for the longest.
TIMEOUT_S = 90.0

#: What a check does; it returns what it saw, in a few words, and raises where that is wrong.
Check = Callable[[], str]


class Checks:
    """The checks of one client, in the order in which they were added."""

    def __init__(self, client: str) -> None:
        self._client = client
        self._checks: dict[str, Check] = {}

    def add(self, check: Check) -> Check:
        """Decorator: `check` under the name of its function."""
        self._checks[check.__name__.replace("_", "-")] = check
        return check

    def run(self) -> None:
        """Carry out all, or those named on the command line, and exit: 0 where every one passed."""
        names = sys.argv[1:] or list(self._checks)
        unknown = [name for name in names if name not in self._checks]
        if unknown:
            sys.exit(f"no check {', '.join(unknown)}; there are {', '.join(self._checks)}")
        passed = [self._run_one(name) for name in names]
        sys.exit(0 if all(passed) else 1)

    def _run_one(self, name: str) -> bool:
        started = time.monotonic()
        ok, detail = True, ""
        try:
            detail = self._checks[name]()
        except Exception as error:
            ok, detail = False, _told(error)
        line = {
            "client": self._client,
            "check": name,
            "ok": ok,
            "detail": detail,
            "seconds": round(time.monotonic() - started, 2),
        }
        print(json.dumps(line), flush=True)
        return ok


def _told(error: Exception) -> str:
    """The line of the check that failed, and what was raised there."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent.parent == _HERE
    ]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}: " if frames else ""
    return f"{place}{type(error).__name__}: {error}"


_HERE = Path(__file__).parent


def same(seen: object, wanted: object, what: str) -> None:
    """Raise unless `seen` is `wanted`, and tell both."""
    if seen != wanted:
        raise AssertionError(f"{what} is {seen!r}, not {wanted!r}")
