"""A stage worker whose layers are timed, not computed: ``python -m bench.timed_worker <flags of the worker>``.

Everything but the layers is the real worker (see `timed_stage`), and its flags are taken as they are. The synthetic
70B wants an offer of much memory, ``--memory 100GiB``; nothing of that is touched. Flags of the timed stage itself
change its cost curve, in microseconds: ``--layer-read-us``, ``--layer-token-us``, ``--layer-context-us`` and
``--overhead-us`` (see `cost_curve`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from bench.timed_stage import load_timed, prepare_synthetic
from bench.timed_worker_flags import parse_curve
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
