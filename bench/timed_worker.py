"""A stage worker whose layers are timed, not computed: ``python -m bench.timed_worker <flags of the worker>``.

Everything but the layers is the real worker (see `timed_stage`). It offers as much memory as the synthetic 70B
takes only if told so: ``--memory 100GiB``; nothing of that is touched. A worker's own flags are taken as they are;
those of the timed stage change its cost curve:
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from bench.cost_curve import CostCurve
from bench.timed_stage import load_timed, prepare_synthetic
from molink_common.service import run_service
from molink_stage_worker.__main__ import serve
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from molink_stage_worker.settings import StageWorkerSettings


def main(arguments: Sequence[str]) -> int:
    """Run until a signal; gives the exit code."""
    curve, rest = parse_curve(arguments)

    def load(spec: StageSpec, progress: Progress) -> Engine:
        return load_timed(spec, curve, progress)

    timed = partial(serve, prepare=prepare_synthetic, load_engine=load)
    return run_service("worker", StageWorkerSettings, timed, rest)


def parse_curve(arguments: Sequence[str]) -> tuple[CostCurve, list[str]]:
    """The curve that the flags ask for, and the flags that are the worker's own."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.timed_worker", description=__doc__, allow_abbrev=False, add_help=False
    )
    for part in fields(CostCurve):
        parser.add_argument(f"--{part.name.removesuffix('_s').replace('_', '-')}-us", type=float, dest=part.name)
    chosen, rest = parser.parse_known_args(arguments)
    given = {name: value / 1e6 for name, value in vars(chosen).items() if value is not None}
    return CostCurve(**given), rest


def curve_flags(curve: CostCurve) -> list[str]:
    """What `parse_curve` makes `curve` of."""
    flags: list[str] = []
    for part in fields(CostCurve):
        name = part.name.removesuffix("_s").replace("_", "-")
        flags += [f"--{name}-us", repr(getattr(curve, part.name) * 1e6)]
    return flags


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
