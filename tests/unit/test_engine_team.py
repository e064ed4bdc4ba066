"""Threads that share the work of one call: all of it is done, once, in order, whoever comes late."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest

from molink_stage_worker.engine import bf16_unit
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.team import Team, claim, done, later, wait

pytestmark = pytest.mark.skipif(not bf16_unit.is_here(), reason="no loops of this processor share work")
PHASES, ITEMS = 200, 37


@partial(jit, nogil=True)
def sums(first: Any, rows: Any, times: Any) -> None:
    """Each phase makes a row of the one before, of all its numbers; counts how often each item was done."""
    for number in range(1, rows.shape[0]):
        own = later(first, number)
        item = claim(own)
        while item < rows.shape[1]:
            rows[number, item] = rows[number - 1].sum() + item
            times[number, item] += 1
            done(own)
            item = claim(own)
        wait(own, rows.shape[1])


def expected() -> Any:
    rows = np.zeros((PHASES, ITEMS), np.int64)
    for number in range(1, PHASES):
        rows[number] = rows[number - 1].sum() + np.arange(ITEMS)
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_is_done_once_and_after_the_phase_before(size: int) -> None:
    team = Team(size)
    with np.errstate(over="ignore"):
        wanted = expected()
    for _ in range(20):
        rows, times = np.zeros((PHASES, ITEMS), np.int64), np.zeros((PHASES, ITEMS), np.int64)
        team.run(sums, PHASES, rows, times, owner=None)
        assert np.array_equal(rows, wanted)
        assert (times[1:] == 1).all()


def test_a_helper_that_comes_late_holds_nobody_up() -> None:
    team = Team(2)
    may_go = threading.Event()

    def hold(_phase: Any) -> None:
        if threading.current_thread().name.startswith("loops"):
            may_go.wait(30)

    team.run(hold, 1, owner=None)
    rows, times = np.zeros((PHASES, ITEMS), np.int64), np.zeros((PHASES, ITEMS), np.int64)
    team.run(sums, PHASES, rows, times, owner=None)  # returns though the helper sleeps
    with np.errstate(over="ignore"):
        assert np.array_equal(rows, expected())
    may_go.set()
    time.sleep(0.05)
    assert (times[1:] == 1).all()


def test_arguments_are_let_go_when_all_have_left() -> None:
    """Not only when the next call comes: most of a worker's memory hangs on them."""
    team = Team(3)

    class Owner:
        ended = threading.Event()

        def __del__(self) -> None:
            self.ended.set()

    rows = np.zeros((2, 2), np.int64)
    team.run(sums, 2, rows, rows.copy(), owner=Owner())
    assert Owner.ended.wait(5)
