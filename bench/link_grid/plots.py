"""Throughput and time per token over the grid, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.link_grid.figures import spread_of

_COLOURS = {"adaptive": "#1b6ca8", "published": "#d98e04", "plain": "#b3322e"}
_FIGURES = (("tokens_per_s", 1.0, "tokens/s"), ("tpot_p50_s", 1e3, "TPOT p50, ms"))


def save_plots(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """A picture for each engine, number of stages and workload: a column a link, a row a figure, a line a policy.

    Error bars go from the least to the largest run; the dashed line is the bound.
    """
    files: list[Path] = []
    whole = [one for one in results if "error" not in one]
    kinds = dict.fromkeys((one["engine"], one["stages"], one["workload"]) for one in whole)
    for engine, stages, workload in kinds:
        chosen = [one for one in whole if (one["engine"], one["stages"], one["workload"]) == (engine, stages, workload)]
        file = folder / f"links-{engine}-{stages}-{workload}.png"
        _save(chosen, f"{engine}, {stages} stages, {workload}", file)
        files.append(file)
    return files


def _save(results: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  only plots need it, and it takes a second

    links = list(dict.fromkeys(one["link"] for one in results))
    policies = list(dict.fromkeys(one["policy"] for one in results))
    figure = Figure(figsize=(3.2 * len(links) + 1, 6.0), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(_FIGURES), len(links), sharex=True, squeeze=False)
    for column, link in enumerate(links):
        here = [one for one in results if one["link"] == link]
        for row, (name, scale, words) in enumerate(_FIGURES):
            axis = axes[row][column]
            for policy in policies:
                _draw_line(axis, [one for one in here if one["policy"] == policy], policy, name, scale)
            if column == 0:
                axis.set_ylabel(words)
        _draw_bound(axes[0][column], [one for one in here if one["policy"] == policies[0]])
        axes[0][column].set_title(link)
        axes[-1][column].set_xlabel("streams")
        for axis in (row[column] for row in axes):
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    counts = sorted({one["concurrency"] for one in results})
    last = axes[-1][-1]  # the others share its x axis
    last.set_xscale("log", base=2)
    last.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
    last.set_xticks(counts, [str(count) for count in counts])
    # a policy may have been measured on some links only
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][0].legend(lines.values(), lines.keys())
    figure.savefig(file, dpi=120)


def _draw_line(axis: Any, results: Sequence[dict[str, Any]], policy: str, name: str, scale: float) -> None:
    points = [
        (one["concurrency"], figure)
        for one in sorted(results, key=lambda one: one["concurrency"])
        if (figure := spread_of(one, name, scale)) is not None
    ]
    if not points:
        return
    medians = [figure.median for _, figure in points]
    below = [figure.median - figure.low for _, figure in points]
    above = [figure.high - figure.median for _, figure in points]
    streams = [count for count, _ in points]
    axis.errorbar(
        streams, medians, yerr=[below, above], label=policy, color=_COLOURS.get(policy), marker="o", capsize=3
    )


def _draw_bound(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    points = sorted((one["concurrency"], one["bound"]["tokens_per_s"]) for one in results if one["bound"])
    if points:
        axis.plot(*zip(*points, strict=True), label="bound", color="#555555", linestyle="--")
