"""A stage worker whose layers are timed, not computed: ``python -m bench.timed_worker <flags of the worker>``.

Everything is the real worker but for the layers (see `timed_stage`) and the speed that it offers, which is its curve's,
and its flags are taken as they are. The synthetic 70B wants an offer of much memory, ``--memory 100GiB``; nothing of
that is touched. Flags of the timed stage itself change its cost curve, in microseconds: ``--layer-read-us``,
``--layer-token-us``, ``--layer-context-us`` and ``--overhead-us`` (see `cost_curve`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from bench.timed_stage import load_timed, parameters_per_s, prepare_synthetic
from bench.timed_worker_flags import parse_curve
from molink_common.service import run_service
from molink_stage_worker.__main__ import serve
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from molink_stage_worker.hardware import Hardware, inspect
from molink_stage_worker.settings import StageWorkerSettings


def main(arguments: Sequence[str]) -> int:
    """Run until a signal; gives the exit code."""
    curve, rest = parse_curve(arguments)

    def load(spec: StageSpec, progress: Progress) -> Engine:
        return load_timed(spec, curve, progress)

    def inspect_timed(*, device: str, memory_bytes: int | None) -> Hardware:
        return replace(inspect(device=device, memory_bytes=memory_bytes), parameters_per_s=parameters_per_s(curve))

    timed = partial(serve, prepare=prepare_synthetic, load_engine=load, inspect=inspect_timed)
    return run_service("worker", StageWorkerSettings, timed, rest)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
