"""From what clients saw to figures. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.load import TokenTrace, percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFigures:
    """One window of a steady load. None: nothing of the kind happened in it."""

    tokens_per_s: float
    """Of the running streams; newcomers with long prompts are not counted."""
    requests: int
    """Ended in the window."""
    tpot_p50_s: float | None
    """Time per output token after the first, over a request: of those that ended in the window."""
    tpot_p99_s: float | None
    gap_p50_s: float | None
    """Between two tokens of a stream. Tokens that come together are no time apart."""
    gap_p99_s: float | None
    gap_max_s: float | None
    ttft_p50_s: float | None
    newcomer_ttfts_s: tuple[float, ...]
    """Of the long prompts whose first token came in the window."""


def window_figures(
    streams: Iterable[TokenTrace], newcomers: Iterable[TokenTrace], start_s: float, end_s: float
) -> WindowFigures:
    """The figures of ``[start_s, end_s)``."""
    if end_s <= start_s:
        raise ValueError(f"a window from {start_s} to {end_s}")
    tokens = requests = 0
    tpots: list[float] = []
    gaps: list[float] = []
    ttfts: list[float] = []
    for trace in streams:
        if not trace.arrivals:
            continue
        first_s, last_s = trace.arrivals[0][0], trace.arrivals[-1][0]
        tokens += sum(count for at_s, count in trace.arrivals if start_s <= at_s < end_s)
        gaps += _gaps(trace.arrivals, start_s, end_s)
        if start_s <= first_s < end_s:
            ttfts.append(first_s - trace.started_s)
        if trace.is_complete and start_s <= last_s < end_s:
            requests += 1
            if trace.num_tokens > 1:
                tpots.append((last_s - first_s) / (trace.num_tokens - 1))
    come = [one for one in newcomers if one.arrivals and start_s <= one.arrivals[0][0] < end_s]
    return WindowFigures(
        tokens_per_s=tokens / (end_s - start_s),
        requests=requests,
        tpot_p50_s=_percentile(tpots, 0.5),
        tpot_p99_s=_percentile(tpots, 0.99),
        gap_p50_s=_percentile(gaps, 0.5),
        gap_p99_s=_percentile(gaps, 0.99),
        gap_max_s=max(gaps, default=None),
        ttft_p50_s=_percentile(ttfts, 0.5),
        newcomer_ttfts_s=tuple(one.arrivals[0][0] - one.started_s for one in come),
    )


def _gaps(arrivals: Sequence[tuple[float, int]], start_s: float, end_s: float) -> list[float]:
    gaps: list[float] = []
    for (before_s, _), (at_s, count) in pairwise(arrivals):
        if start_s <= at_s < end_s:
            gaps += [at_s - before_s, *([0.0] * (count - 1))]
    return gaps


def _percentile(values: Sequence[float], share: float) -> float | None:
    return percentile(values, share) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over several runs."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}–{self.high:.1f})"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Least, median and largest of those that there are; None when there are none."""
    known = [value for value in values if value is not None]
    return Spread(low=min(known), median=statistics.median(known), high=max(known)) if known else None


def spread_of(result: dict[str, Any], figure: str, scale: float = 1.0) -> Spread | None:
    """Of a figure over the runs of a cell's result, times `scale`."""
    values = (run[figure] for run in result.get("runs", ()))
    return spread(None if value is None else value * scale for value in values)
