"""``python -m molink_stage_worker.models REFERENCE [--cache DIR]``: prepare a model and print its card.

Prints one JSON object a line: any number of ``{"doing": "downloading", "share": 0.4}`` (share null where nobody
knows), then ``{"card": {…}, "folder": "…"}`` and exit code 0, or ``{"error": "one sentence"}`` and exit code 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from molink_common.errors import MolinkError
from molink_common.folders import cache_folder
from molink_stage_worker.models import prepare

_LEAST_BETWEEN_LINES_S = 0.1


class ProgressLines:
    """Prints progress, at most ten lines a second for one doing, and always a doing's start and end."""

    def __init__(self) -> None:
        self._last_doing: str | None = None
        self._last_line_s = 0.0

    def __call__(self, doing: str, share: float | None) -> None:
        """See `Progress`."""
        now_s = time.monotonic()
        is_due = doing != self._last_doing or share == 1.0 or now_s - self._last_line_s >= _LEAST_BETWEEN_LINES_S
        if is_due:
            self._last_doing, self._last_line_s = doing, now_s
            print_line({"doing": doing, "share": None if share is None else round(share, 3)})


def print_line(body: dict[str, Any]) -> None:
    """One JSON object on a line of its own, at once."""
    sys.stdout.write(orjson.dumps(body).decode() + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Prepare the model that the arguments name; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m molink_stage_worker.models", description="Prepare a model.")
    parser.add_argument("reference", help="demo, a folder, a .gguf file, or a hub id such as owner/name")
    parser.add_argument("--cache", type=Path, default=None, help="folder for downloads and conversions")
    options = parser.parse_args(arguments)
    # a stop from outside unwinds like Ctrl-C, so that working folders are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        model = prepare(options.reference, cache=options.cache or cache_folder(), progress=ProgressLines())
    except MolinkError as error:
        print_line({"error": str(error)})
        return 1
    except KeyboardInterrupt:
        return 130
    print_line({"card": model.card.model_dump(mode="json"), "folder": str(model.folder)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
