"""The case ``wan30``: two stages over 100 Mbit/s and 30 ms, in six ratios and what they come from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.link_grid.cells import LAN, Cell, EngineKind, Setup, Workload
from bench.link_grid.figures import spread_of
from bench.link_grid.measuring import Timing
from bench.link_grid.results import find

LINK = "100m30"
_REAL_STREAMS, _SYNTHETIC_STREAMS = 64, 32


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


def timing(cell: Cell) -> Timing:
    """Windows that hold many steps of the cell, and whole numbers of newcomers; under eight minutes in all.

    The plain pipeline needs seconds for a step that carries a long prompt.
    """
    seconds = 10.0 if cell.workload is Workload.DECODE else 20.0 if cell == MIXED_PLAIN else 15.0
    return Timing(runs=3, seconds=seconds, warm_s=8.0, most_warm_s=20.0)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ratios, of medians over the runs; None where a figure is missing. Then every figure behind them."""
    found = {cell: find(results, cell.key) or {} for cell in CELLS}
    rates = {cell: _median(found[cell], "tokens_per_s") for cell in CELLS}
    whole = {cell: found[cell].get("whole", {}) for cell in CELLS}
    ttfts = {cell: _middle(whole[cell].get("newcomer_ttfts_s")) for cell in CELLS}
    share: float | None = found[REAL_WAN].get("share_of_bound")
    return {
        "bound_ratio": _ratio(share, 1.0),
        "pipeline_bound_ratio": _ratio(
            rates[REAL_WAN], (found[REAL_WAN].get("pipeline_bound") or {}).get("tokens_per_s")
        ),
        "lan_ratio": _ratio(rates[REAL_WAN], rates[REAL_LAN]),
        "plain_ratio": _ratio(rates[MIXED], rates[MIXED_PLAIN]),
        "published_ratio": _ratio(rates[MIXED], rates[MIXED_PUBLISHED]),
        "tpot_p50_ratio": _ratio(whole[MIXED].get("tpot_p50_s"), whole[DECODE].get("tpot_p50_s")),
        "tpot_p99_ratio": _ratio(whole[MIXED].get("tpot_p99_s"), whole[DECODE].get("tpot_p99_s")),
        "published_tpot_p99_ratio": _ratio(whole[MIXED_PUBLISHED].get("tpot_p99_s"), whole[MIXED].get("tpot_p99_s")),
        "newcomer_ttft_to_plain_ratio": _ratio(ttfts[MIXED], ttfts[MIXED_PLAIN]),
        "newcomer_ttft_to_published_ratio": _ratio(ttfts[MIXED], ttfts[MIXED_PUBLISHED]),
        "figures": {str(cell): found[cell] for cell in CELLS},
    }


def _median(result: dict[str, Any], figure: str) -> float | None:
    found = spread_of(result, figure)
    return None if found is None else found.median


def _middle(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 3)
