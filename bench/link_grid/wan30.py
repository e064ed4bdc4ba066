"""The case ``wan30``: two stages over 100 Mbit/s and 30 ms, in six ratios and what they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.link_grid.cells import LAN, Cell, EngineKind, Setup, Workload
from bench.link_grid.figures import Spread, spread_of
from bench.link_grid.measuring import Timing
from bench.link_grid.results import find

LINK = "100m30"
_REAL_STREAMS, _SYNTHETIC_STREAMS = 64, 32
TIMING = Timing(runs=3, seconds=15.0, warm_s=10.0, most_warm_s=30.0)
"""Five systems and six cells in about seven minutes."""


def _cell(engine: EngineKind, link: str, policy: str, streams: int, workload: Workload) -> Cell:
    setup = Setup(engine=engine, stages=2, link=link, policy=policy)
    return Cell(setup=setup, concurrency=streams, workload=workload)


REAL_LAN = _cell(EngineKind.REAL, LAN, "adaptive", _REAL_STREAMS, Workload.DECODE)
REAL_WAN = _cell(EngineKind.REAL, LINK, "adaptive", _REAL_STREAMS, Workload.DECODE)
DECODE = _cell(EngineKind.SYNTHETIC, LINK, "adaptive", _SYNTHETIC_STREAMS, Workload.DECODE)
MIXED = _cell(EngineKind.SYNTHETIC, LINK, "adaptive", _SYNTHETIC_STREAMS, Workload.MIXED)
MIXED_PLAIN = _cell(EngineKind.SYNTHETIC, LINK, "plain", _SYNTHETIC_STREAMS, Workload.MIXED)
MIXED_PUBLISHED = _cell(EngineKind.SYNTHETIC, LINK, "published", _SYNTHETIC_STREAMS, Workload.MIXED)
CELLS = (REAL_LAN, REAL_WAN, DECODE, MIXED, MIXED_PLAIN, MIXED_PUBLISHED)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ratios, of medians over the runs; None where a figure is missing. Then every figure behind them."""
    rates = {cell: _of(results, cell, "tokens_per_s", lambda figure: figure.median) for cell in CELLS}
    real = find(results, REAL_WAN.key) or {}
    return {
        "bound_ratio": _rounded(real.get("share_of_bound")),
        "lan_ratio": _ratio(rates[REAL_WAN], rates[REAL_LAN]),
        "plain_ratio": _ratio(rates[MIXED], rates[MIXED_PLAIN]),
        "published_ratio": _ratio(rates[MIXED], rates[MIXED_PUBLISHED]),
        "tpot_p50_ratio": _ratio(_whole(results, MIXED, "tpot_p50_s"), _whole(results, DECODE, "tpot_p50_s")),
        "tpot_p99_ratio": _ratio(_whole(results, MIXED, "tpot_p99_s"), _whole(results, DECODE, "tpot_p99_s")),
        "published_tpot_p99_ratio": _ratio(
            _whole(results, MIXED_PUBLISHED, "tpot_p99_s"), _whole(results, MIXED, "tpot_p99_s")
        ),
        "figures": {str(cell): find(results, cell.key) for cell in CELLS},
    }


def _of(results: Sequence[dict[str, Any]], cell: Cell, figure: str, pick: Callable[[Spread], float]) -> float | None:
    found = spread_of(find(results, cell.key) or {}, figure)
    return None if found is None else pick(found)


def _whole(results: Sequence[dict[str, Any]], cell: Cell, figure: str) -> float | None:
    """Over all runs together: a 99th percentile wants many requests."""
    value: float | None = (find(results, cell.key) or {}).get("whole", {}).get(figure)
    return value


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
