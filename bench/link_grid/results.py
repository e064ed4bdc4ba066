"""The results of a grid in a file that grows cell by cell, so that one that was interrupted can go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from bench.link_grid.cells import Cell

_NAMES = ("engine", "stages", "link", "policy", "concurrency", "workload")
"""Of a cell, whichever turn it is."""


class Results:
    """What has been measured. Every cell is written at once; a crash loses the one under way only."""

    def __init__(self, file: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        """Take over what the file holds, or begin anew.

        Raises:
            ValueError: `resume`, and the file was measured in another way.
        """
        self._file = file
        self._about = dict(about)
        self._cells: list[dict[str, Any]] = []
        if resume:
            with contextlib.suppress(FileNotFoundError):
                found = orjson.loads(file.read_bytes())
                if found["about"] != orjson.loads(orjson.dumps(self._about)):
                    raise ValueError(f"{file} was measured otherwise: {found['about']}; use another --out")
                self._cells = [cell for cell in found["cells"] if "error" not in cell]
        file.parent.mkdir(parents=True, exist_ok=True)

    @property
    def cells(self) -> list[dict[str, Any]]:
        """In the order in which they were measured."""
        return list(self._cells)

    def has(self, cell: Cell) -> bool:
        """Whether the cell has been measured."""
        return self.find(cell) is not None

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result."""
        return find(self._cells, cell.key)

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, on the disk too."""
        self._cells.append(result)
        body = orjson.dumps({"about": self._about, "cells": self._cells}, option=orjson.OPT_INDENT_2)
        scratch = self._file.with_suffix(".part")
        scratch.write_bytes(body)
        scratch.replace(self._file)


def pooled(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A result for each cell, of all turns that did not fail: their runs together, the rest from the middle turn.

    The middle one by its rate, which its share of the bound belongs to.
    """
    by_cell: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in results:
        by_cell.setdefault(tuple(one[name] for name in _NAMES), []).append(one)
    return [_pooled_turns([one for one in turns if "error" not in one] or turns[:1]) for turns in by_cell.values()]


def _pooled_turns(turns: list[dict[str, Any]]) -> dict[str, Any]:
    if len(turns) == 1:
        return turns[0]
    ordered = sorted(turns, key=lambda one: float(one["whole"]["tokens_per_s"]))
    middle = ordered[(len(ordered) - 1) // 2]
    return {**middle, "runs": [run for one in turns for run in one["runs"]]}


def find(results: Iterable[dict[str, Any]], key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first result whose cell has these properties."""
    return next((one for one in results if all(one[name] == value for name, value in key.items())), None)
