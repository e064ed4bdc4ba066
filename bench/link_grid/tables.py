"""Results as Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.link_grid.figures import Spread, spread_of
from bench.link_grid.results import find

_COLUMNS = (
    "link",
    "streams",
    "workload",
    "policy",
    "tokens/s",
    "bound",
    "share",
    "TPOT p50 ms",
    "TPOT p99 ms",
    "gap p99 ms",
    "longest gap ms",
    "TTFT p50 ms",
    "newcomers' TTFT p50 s",
)


def grid_tables(results: Sequence[dict[str, Any]]) -> str:
    """A table for each engine and number of stages. A figure is: median (least–largest) of the runs."""
    parts: list[str] = []
    for engine, stages in dict.fromkeys((one["engine"], one["stages"]) for one in results):
        of_it = [one for one in results if (one["engine"], one["stages"]) == (engine, stages)]
        parts.append(f"## {engine}, {stages} stages\n\n{_table(_COLUMNS, [_row(one) for one in of_it])}")
    return "\n\n".join(parts) + "\n"


def _row(result: dict[str, Any]) -> list[str]:
    names = [result["link"], str(result["concurrency"]), result["workload"], result["policy"]]
    if "error" in result:
        return [*names, f"failed: {result['error'].splitlines()[0][:80]}", *[""] * (len(_COLUMNS) - 5)]
    bound, share = result["bound"], result.get("share_of_bound")
    newcomers = [value for run in result["runs"] for value in run["newcomer_ttfts_s"]]
    return [
        *names,
        _shown(spread_of(result, "tokens_per_s")),
        f"{bound['tokens_per_s']:.1f} ({bound['limit']}, {bound['micro_batches']})" if bound else "–",
        f"{share:.0%}" if share is not None else "–",
        _shown(spread_of(result, "tpot_p50_s", 1e3)),
        _shown(spread_of(result, "tpot_p99_s", 1e3)),
        _shown(spread_of(result, "gap_p99_s", 1e3)),
        _shown(spread_of(result, "gap_max_s", 1e3)),
        _shown(spread_of(result, "ttft_p50_s", 1e3)),
        f"{sorted(newcomers)[len(newcomers) // 2]:.2f} of {len(newcomers)}" if newcomers else "–",
    ]


def best_count_table(results: Sequence[dict[str, Any]]) -> str:
    """The planner next to the best fixed number of micro-batches."""
    rows: list[list[str]] = []
    for planned in results:
        if planned["policy"] != "adaptive" or "error" in planned:
            continue
        best = best_count(results, planned)
        rate = spread_of(planned, "tokens_per_s")
        if best is None or rate is None:
            continue
        fixed, count = best
        names = [planned["engine"], str(planned["stages"]), planned["link"], str(planned["concurrency"])]
        plan = planned["plan"] or {}
        ratio = f"{rate.median / fixed.median:.2f}"
        rows.append(
            [*names, planned["workload"], str(rate), str(plan.get("micro_batches", "–")), str(fixed), count, ratio]
        )
    columns = ("engine", "stages", "link", "streams", "workload")
    return _table((*columns, "planned tokens/s", "planned M", "best fixed tokens/s", "best M", "ratio"), rows) + "\n"


def best_count(results: Iterable[dict[str, Any]], planned: dict[str, Any]) -> tuple[Spread, str] | None:
    """The rate of the fixed number of micro-batches that was fastest where `planned` was measured, and the number."""
    place = {name: planned[name] for name in ("engine", "stages", "link", "concurrency", "workload")}
    rates: list[tuple[Spread, str]] = []
    for one in results:
        _, _, count = one["policy"].partition(":")
        rate = spread_of(one, "tokens_per_s")
        if count and rate is not None and find([one], place):
            rates.append((rate, count))
    return max(rates, key=lambda rate: rate[0].median, default=None)


def _shown(figure: Spread | None) -> str:
    return "–" if figure is None else str(figure)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
