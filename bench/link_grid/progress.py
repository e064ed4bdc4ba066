"""How far a measurement is, and how long it will take. Lines for the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.link_grid.cells import Cell
from bench.link_grid.figures import spread_of
from bench.link_grid.measuring import TimingOf

_START_S = 25.0
"""Of a system, until one has been seen."""
_BETWEEN_S = 2.0
"""From a cell to the next."""


class Progress:
    """Tells of each cell, on stderr."""

    def __init__(self, cells: Sequence[Cell], timing: TimingOf) -> None:
        self._left = list(cells)
        self._count = len(cells)
        self._timing = timing
        self._began_s = time.perf_counter()
        self._expected_s = expected_s(cells, timing)
        self._done_s = 0.0

    def start(self) -> None:
        """Before the first cell."""
        say(f"{self._count} cells, about {self._expected_s / 60:.0f} min")

    def done(self, cell: Cell, result: dict[str, Any]) -> None:
        """After each cell."""
        self._left.remove(cell)
        taken_s = time.perf_counter() - self._began_s
        still_s = expected_s(self._left, self._timing)
        # what has been done tells how much slower or faster than expected it goes
        pace = taken_s / max(self._expected_s - still_s, 1.0)
        rate = spread_of(result, "tokens_per_s")
        share = result.get("share_of_bound")
        words = f"{rate} tokens/s" if rate is not None else f"failed: {result.get('error')}"
        words += f", {share:.0%} of the bound" if share is not None else ""
        say(f"[{self._count - len(self._left)}/{self._count}] {cell}: {words}; {still_s * pace / 60:.0f} min left")


def expected_s(cells: Sequence[Cell], timing: TimingOf) -> float:
    """How long the cells take, if nothing fails: a start for each set-up, then warming up and measuring."""
    measuring_s = sum(one.warm_s + _BETWEEN_S + one.runs * one.seconds for one in (timing(cell) for cell in cells))
    return len({(cell.setup, cell.turn) for cell in cells}) * _START_S + measuring_s


def say(words: str) -> None:
    """Show progress. Standard output is for results."""
    print(words, file=sys.stderr, flush=True)
