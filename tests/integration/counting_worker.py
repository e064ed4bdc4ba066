"""A stage worker as a process of its own, with an engine that fits on a screen and a model that needs no files."""

from __future__ import annotations

import sys
from functools import partial

from molink_common.service import run_service
from molink_stage_worker.__main__ import serve
from molink_stage_worker.settings import StageWorkerSettings
from tests.integration.counting_engine import CountingEngine, CountingModel

if __name__ == "__main__":
    counting = partial(
        serve,
        prepare=lambda _reference, _cache, _told: CountingModel(),
        load_engine=lambda spec, _progress: CountingEngine(spec),
    )
    raise SystemExit(run_service("worker", StageWorkerSettings, counting, sys.argv[1:]))
