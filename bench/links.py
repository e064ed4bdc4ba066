"""Throughput and latency over weak links, next to the baselines and to what physics allows.

    python -m bench.links --case wan30 --json      two stages over 100 Mbit/s and 30 ms: six ratios in minutes
    python -m bench.links --grid                   every engine, link, load and policy: table, plots and JSON
    python -m bench.links --grid --best-m          the planner next to fixed numbers of micro-batches

The system is the real one: NATS, Redis, scheduler, gateway and workers on the hosts of a laboratory (see `netlab`;
it needs root on Linux), asked over HTTP by streams in closed loops. The engine is the real SmolLM2, where processors
are the limit, or a timed 70B, where the link is (see `timed_stage`). A cell's runs are windows of one running load,
one after the other; its warm-up is not counted. On a machine whose speed moves only neighbours compare: with
``--turns`` every policy of a link is measured several times by turns. The bound is that of `bounds`. The clients run
on the same machine. Progress goes to stderr. Whatever ends this program, nothing of the system is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from bench.cost_curve import CostCurve
from bench.link_grid import wan30
from bench.link_grid.cells import Cell, EngineKind, Workload, grid
from bench.link_grid.measuring import Timing, TimingOf, measured
from bench.link_grid.plots import save_plots
from bench.link_grid.progress import Progress, say
from bench.link_grid.results import Results, pooled
from bench.link_grid.tables import best_count_table, grid_tables
from molink_common.errors import MolinkError

_COUNTS = ("1", "2", "3", "4", "6", "8", "12", "16")


async def run_grid(arguments: argparse.Namespace) -> bool:
    """Measure what has not been measured yet; then write table and plots of everything. Whether nothing failed."""
    timing = timing_of(arguments, Timing())
    about = {
        "timing": asdict(timing),
        "turns": arguments.turns,
        "curve": asdict(CostCurve()),
        "assumed_link_mbit": arguments.assumed_link_mbit,
    }
    results = Results(arguments.out / "links.json", about, resume=arguments.resume)
    cells = [cell for cell in cells_of(arguments) if not results.has(cell)]
    await measure(cells, lambda _: timing, arguments.assumed_link_mbit, arguments.out / "logs", results.add)
    found = pooled(results.cells)
    text = best_count_table(found) if arguments.best_m else grid_tables(found)
    (arguments.out / "links.md").write_text(text)
    files = save_plots(found, arguments.out)
    print(text)
    print("written:", *(str(file) for file in (arguments.out / "links.json", arguments.out / "links.md", *files)))
    return not any("error" in result for result in results.cells)


async def run_case(arguments: argparse.Namespace) -> bool:
    """Measure the case's cells and print its summary. Whether nothing failed."""
    results: list[dict[str, Any]] = []
    await measure(
        wan30.CELLS,
        lambda cell: timing_of(arguments, wan30.timing(cell)),
        arguments.assumed_link_mbit,
        arguments.out / "logs",
        results.append,
    )
    if not arguments.json:
        print(grid_tables(results))
    found = wan30.summary(results)
    shown = found if arguments.json else {name: found[name] for name in found if name != "figures"}
    print(orjson.dumps(shown).decode())
    return not any("error" in result for result in results)


async def measure(
    cells: Sequence[Cell],
    timing: TimingOf,
    assumed_link_mbit: float,
    logs: Path,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure cell by cell, a system for each set-up; `keep` gets each result at once."""
    progress = Progress(cells, timing)
    progress.start()
    for (setup, _), of_it in groupby(cells, key=lambda cell: (cell.setup, cell.turn)):
        wanted = list(of_it)
        found = measured(
            setup, wanted, timing=timing, curve=CostCurve(), assumed_link_mbit=assumed_link_mbit, logs=logs
        )
        async with contextlib.aclosing(found) as results:
            async for result in results:
                keep(result)
                progress.done(next(cell for cell in wanted if cell.key.items() <= result.items()), result)


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """The grid that the flags ask for."""
    policies: list[str] = arguments.policies
    if arguments.best_m:
        policies = ["adaptive", *(f"adaptive:{count}" for count in arguments.counts)]
    return list(
        grid(
            engines=arguments.engines,
            stages=arguments.stages,
            links=arguments.links,
            policies=policies,
            concurrency=arguments.concurrency,
            workloads=arguments.workloads,
            turns=arguments.turns,
        )
    )


def timing_of(arguments: argparse.Namespace, usual: Timing) -> Timing:
    """As `usual`, but for what the flags say."""
    return Timing(
        runs=arguments.runs or usual.runs,
        seconds=arguments.seconds or usual.seconds,
        warm_s=arguments.warm_s or usual.warm_s,
        most_warm_s=usual.most_warm_s,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags.

    Raises:
        SystemExit: they are wrong, or ask for help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grid", action="store_true", help="measure the grid that the flags below make up")
    what.add_argument("--case", choices=["wan30"], help="measure one case")
    parser.add_argument("--json", action="store_true", help="with --case: one JSON object with every figure, last")
    parser.add_argument("--engines", type=_list_of(EngineKind), default=list(EngineKind), help="real,synthetic")
    parser.add_argument("--stages", type=_list_of(int), default=[2, 3])
    parser.add_argument("--links", type=_list_of(str), default=["lan", "1g2", "100m30", "100m100", "10m30"])
    parser.add_argument("--concurrency", type=_list_of(int), default=[1, 8, 32, 64])
    parser.add_argument("--workloads", type=_list_of(Workload), default=list(Workload), help="decode,mixed")
    parser.add_argument("--policies", type=_list_of(str), default=["adaptive", "plain", "published"])
    parser.add_argument("--best-m", action="store_true", help="in place of the policies: adaptive, and fixed counts")
    parser.add_argument("--counts", type=_list_of(str), default=list(_COUNTS), help="of micro-batches, with --best-m")
    parser.add_argument("--turns", type=int, default=1, help="measure each link's policies by turns, so many times")
    parser.add_argument("--assumed-link-mbit", type=float, default=100.0, help="what policy published plans with")
    parser.add_argument("--runs", type=int, help="windows a cell (3)")
    parser.add_argument("--seconds", type=float, help="of a window (15)")
    parser.add_argument("--warm-s", type=float, help="before the first window, at least (10)")
    parser.add_argument("--out", type=Path, default=Path("build/links"), help="folder for table, plots, JSON and logs")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    arguments = parser.parse_args(argv)
    try:
        cells_of(arguments)
        timing_of(arguments, Timing())
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parsed(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parsed


def main(argv: Sequence[str]) -> int:
    """Run; gives the exit code."""
    arguments = parse(argv)
    try:
        is_whole = asyncio.run(run_case(arguments) if arguments.case else run_grid(arguments))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("ended early" + ("; go on with --resume" if arguments.grid else ""))
        return 130
    except (MolinkError, ValueError) as error:
        say(f"bench.links: {error}")
        return 1
    return 0 if is_whole else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
