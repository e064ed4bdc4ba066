"""Measures the cells of a setup on one running system.

A cell's runs are windows of the same load, one right after the other, so that their spread is that of the system and
not of its start.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench.bounds import Bound, Load, best, with_processors
from bench.cost_curve import CostCurve
from bench.link_grid.bounding import load_of, pipeline_bound
from bench.link_grid.cells import Cell, Setup, Workload
from bench.link_grid.figures import spread, window_figures
from bench.link_grid.steady_load import LoadShape, SteadyLoad, Target, steady_load
from bench.load import RequestFailed
from bench.netlab.registry import LabError
from bench.netlab.serving import OtherOrder, ServingSystem, serving

_IDLE_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 0.5
_MOST_ORDERS = 6
"""How often to start a system again that stands in another order than the topology wants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long to measure."""

    runs: int = 3
    seconds: float = 15.0
    """Of each run."""
    warm_s: float = 10.0
    """At least, before the first run: the planner needs a few seconds to learn what things cost."""
    most_warm_s: float = 60.0
    newcomer_every_s: float = 5.0

    def __post_init__(self) -> None:
        if self.runs < 1 or min(self.seconds, self.warm_s, self.newcomer_every_s) <= 0:
            raise ValueError(f"nothing can be measured with {self}")


TimingOf = Callable[[Cell], Timing]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    at_s: float
    status: dict[str, Any]
    processors_s: tuple[float, float]
    """Of all processors since the machine's start: busy, and idle."""


async def measured(
    setup: Setup, cells: Sequence[Cell], *, timing: TimingOf, curve: CostCurve, assumed_link_mbit: float, logs: Path
) -> AsyncGenerator[dict[str, Any], None]:
    """The results of `cells`, all of `setup`, as they come. A cell that fails has an ``error`` in its result.

    After a failure the system is started anew for the cells that are left. Close the iterator to stop everything.
    What the parts of the system say is in `logs`.
    """
    left = list(cells)
    other_orders = 0
    while left:
        is_serving = False
        try:
            async with serving(
                setup.topology,
                logs / str(setup).replace(" ", "-").replace(":", "-"),
                scheduler_flags=[*setup.scheduler_flags, "--assumed-link-mbit", str(assumed_link_mbit)],
                worker_flags=setup.worker_flags(curve),
                worker_module=setup.worker_module,
            ) as system:
                is_serving = True
                while left:
                    result = await measure_cell(system, left[0], timing=timing(left[0]), curve=curve)
                    yield left.pop(0).key | result
        except (RequestFailed, OSError, TimeoutError, httpx.HTTPError, LabError) as error:
            problem = str(error) or type(error).__name__
            print(f"{setup}: {problem}", file=sys.stderr, flush=True)
            other_orders += isinstance(error, OtherOrder)
            if isinstance(error, OtherOrder) and other_orders < _MOST_ORDERS:
                continue
            failed = left[:1] if is_serving else left
            left = left[len(failed) :]
            for cell in failed:
                yield cell.key | {"error": problem}


async def measure_cell(system: ServingSystem, cell: Cell, *, timing: Timing, curve: CostCurve) -> dict[str, Any]:
    """Wait until the system is idle, put the cell's load on it, let it settle, and measure its runs.

    Raises:
        RequestFailed, OSError, TimeoutError: it did not answer as it should.
    """
    await _until_idle(system)
    every_s = timing.newcomer_every_s if cell.workload is Workload.MIXED else None
    shape = LoadShape(streams=cell.concurrency, newcomer_every_s=every_s)
    target = Target(host=system.host, port=system.port, model=(await system.status())["card"]["name"])
    async with steady_load(target, shape) as load:
        await load.until_warm(timing.warm_s, timing.most_warm_s)
        before = await _look(system)
        marks_s = [time.perf_counter()]
        for _ in range(timing.runs):
            await asyncio.sleep(timing.seconds - (time.perf_counter() - marks_s[-1]))
            marks_s.append(time.perf_counter())
        after = await _look(system)
    if _life(before) != _life(after):
        raise RequestFailed(f"the pipeline was lost meanwhile: {after.status['reason']}")
    return _result(cell, curve, load, marks_s, before, after)


async def _look(system: ServingSystem) -> _Snapshot:
    status = await system.status()
    return _Snapshot(at_s=time.perf_counter(), status=status, processors_s=processors_s())


def processors_s() -> tuple[float, float]:
    """See proc(5): user nice system idle iowait irq softirq steal. Stolen time is no idle time."""
    fields = [float(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, idle


def _life(snapshot: _Snapshot) -> list[tuple[int, int]]:
    """Number and epoch of the one pipeline; none while it forms anew."""
    return [(one["pipeline"], one["epoch"]) for one in snapshot.status["pipelines"]]


async def _until_idle(system: ServingSystem) -> None:
    """The clients of the cell before have hung up; wait until nothing of theirs is left."""
    async with asyncio.timeout(_IDLE_TIMEOUT_S):
        while True:
            status = await system.status()
            head = status["pipelines"][0].get("head") if status["pipelines"] else None
            if not status["sequences"] and head is not None and not (head["running"] or head["waiting"]):
                return
            await asyncio.sleep(_LOOK_AGAIN_S)


def _result(
    cell: Cell,
    curve: CostCurve,
    load: SteadyLoad,
    marks_s: Sequence[float],
    before: _Snapshot,
    after: _Snapshot,
) -> dict[str, Any]:
    runs = [window_figures(load.streams, load.newcomers, *window_s) for window_s in pairwise(marks_s)]
    whole = window_figures(load.streams, load.newcomers, marks_s[0], marks_s[-1])
    result: dict[str, Any] = {
        "runs": [asdict(run) for run in runs],
        "whole": asdict(whole),
        "newcomers_left_out": load.left_out,
        "stage_busy": _busy(before, after),
        "processors_busy": _processors_busy(before, after),
        "links": [worker["stage"].get("link") for worker in _stages(after.status)],
        "plan": after.status["pipelines"][0].get("head"),
    }
    rates = spread(run.tokens_per_s for run in runs)
    bound = _bound(cell, curve, load_of(load, marks_s[-1]), after.status)
    result["bound"] = result["pipeline_bound"] = None if bound is None else asdict(bound)
    if bound is not None and rates is not None and rates.median > 0:
        bound = with_processors(bound, tokens_per_s=whole.tokens_per_s, busy_share=_processors_busy(before, after))
        result["bound"] = asdict(bound)
        result["share_of_bound"] = rates.median / bound.tokens_per_s
    return result


def _bound(cell: Cell, curve: CostCurve, load: Load, status: Mapping[str, Any]) -> Bound | None:
    pipeline = pipeline_bound(cell.setup, curve, status)
    return None if pipeline is None else best(pipeline, load)


def _processors_busy(before: _Snapshot, after: _Snapshot) -> float:
    busy_s, idle_s = (later - earlier for earlier, later in zip(before.processors_s, after.processors_s, strict=True))
    return round(max(busy_s / max(busy_s + idle_s, 1e-9), 1e-3), 3)


def _stages(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The workers that hold stages, head first."""
    workers = [worker for worker in status["workers"] if worker["stage"]]
    return sorted(workers, key=lambda worker: int(worker["stage"]["index"]))


def _busy(before: _Snapshot, after: _Snapshot) -> list[float]:
    """The share of each stage's time that it computed, from its own account of it in two heartbeats."""
    return [
        round(
            (other["stage"]["compute_s"] - one["stage"]["compute_s"]) / (_beat_s(after, other) - _beat_s(before, one)),
            3,
        )
        for one, other in zip(_stages(before.status), _stages(after.status), strict=True)
    ]


def _beat_s(snapshot: _Snapshot, worker: Mapping[str, Any]) -> float:
    """When the worker said what the snapshot shows of it."""
    silent_s: float = worker["silent_s"]
    return snapshot.at_s - silent_s
