"""Throughput, waiting and refusals over the offered load, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_plot(report: dict[str, Any], file: Path) -> None:
    """Three panels side by side; the dashed line is the capacity."""
    from matplotlib.figure import Figure  # noqa: PLC0415  only plots need it, and it takes a second

    rows = report["rates"]
    loads = [row["load"] for row in rows]
    figure = Figure(figsize=(13, 4), layout="constrained")
    throughput, waiting, refusals = figure.subplots(1, 3, sharex=True)
    throughput.plot(loads, [row["tokens_per_s"] for row in rows], marker="o", color="#1b6ca8")
    throughput.set_title("throughput, tokens/s")
    for name, words, colour in (("ttft", "first token", "#b3322e"), ("itl", "between tokens", "#1b6ca8")):
        for share, style in ((50, "-"), (99, "--")):
            waiting_ms = [row[f"{name}_p{share}_ms"] for row in rows]
            waiting.plot(loads, waiting_ms, style, marker="o", color=colour, label=f"{words}, p{share}")
    waiting.axhline(report["ttft_target_s"] * 1e3, color="#888888", linewidth=0.8)
    waiting.annotate("target for first tokens", (loads[0], report["ttft_target_s"] * 1e3), va="bottom", fontsize=8)
    waiting.set_yscale("log")
    waiting.set_title("waiting of the admitted, ms")
    waiting.legend(fontsize=8)
    for name, words, style, colour, scale in (
        ("refused_share", "refused, %", "-", "#d98e04", 100),
        ("refusal_p50_ms", "429 after, p50 ms", "-", "#1b6ca8", 1),
        ("refusal_p99_ms", "429 after, p99 ms", "--", "#1b6ca8", 1),
    ):
        values = [None if row[name] is None else scale * row[name] for row in rows]
        refusals.plot(loads, values, style, marker="o", color=colour, label=words)
    refusals.set_title("refusals")
    refusals.legend(fontsize=8)
    for axis in (throughput, waiting, refusals):
        axis.axvline(1.0, color="#888888", linestyle=":", linewidth=1)
        axis.set_xlabel(f"offered load (1 = capacity, {report['capacity_per_s']:g} requests/s)")
        axis.grid(alpha=0.3)
    for axis in (throughput, refusals):
        axis.set_ylim(bottom=0)
    figure.savefig(file, dpi=120)
