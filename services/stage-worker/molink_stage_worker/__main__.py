"""``python -m molink_stage_worker``: one stage worker as a process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from molink_common.bus import open_bus
from molink_common.folders import cache_folder
from molink_common.identity import new_peer_id
from molink_common.memory import spare_what_lives
from molink_common.service import run_service
from molink_common.telemetry import open_telemetry
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.hardware import Hardware, usable_threads
from molink_stage_worker.hardware import inspect as inspect_hardware
from molink_stage_worker.models import prepare as prepare_model
from molink_stage_worker.settings import StageWorkerSettings, size_bytes
from molink_stage_worker.stage_loading import EngineLoader, Told
from molink_stage_worker.stage_slot import SlotSettings
from molink_stage_worker.worker import Prepared, Worker

PrepareIn = Callable[[str, Path, Told], Prepared]
"""`Prepare`, told the folder for models too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal; gives the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_service("worker", StageWorkerSettings, serve, given)


def _prepare(reference: str, cache: Path, told: Told) -> Prepared:
    return prepare_model(reference, cache=cache, progress=told)


async def serve(
    settings: StageWorkerSettings,
    stop: asyncio.Event,
    *,
    prepare: PrepareIn = _prepare,
    load_engine: EngineLoader = load_engine,
    inspect: Callable[..., Hardware] = inspect_hardware,
) -> None:
    """Open what the worker needs, run it, close everything."""
    threads = settings.threads or usable_threads()
    torch.set_num_threads(threads)
    memory_bytes = None if settings.memory == "auto" else size_bytes(settings.memory)
    hardware = inspect(device=settings.device, memory_bytes=memory_bytes)
    worker_id = settings.worker_id or new_peer_id("worker")
    cache = settings.cache or cache_folder()
    telemetry = open_telemetry(
        service="stage-worker",
        instance=worker_id,
        endpoint=settings.otlp_endpoint,
        trace_share=settings.trace_share,
    )
    workers: list[Worker] = []  # the bus is opened before the worker that hears of its faults

    def on_fault(problem: str) -> None:
        for worker in workers:
            worker.on_bus_fault(problem)

    def on_reconnect() -> None:
        for worker in workers:
            worker.on_reconnect()

    try:
        async with (
            open_bus(settings.bus_settings(), name=worker_id, on_fault=on_fault, on_reconnect=on_reconnect) as bus,
            open_bus(
                settings.bus_settings(), name=f"{worker_id}-bulk", on_fault=on_fault, on_reconnect=on_reconnect
            ) as bulk_bus,
        ):
            worker = Worker(
                bus=bus,
                bulk_bus=bulk_bus,
                settings=SlotSettings(
                    worker=worker_id,
                    device=hardware.device,
                    threads=threads,
                    step_tokens=settings.step_tokens or _default_step_tokens(hardware.device),
                    max_running=settings.max_running,
                    journal_bytes=size_bytes(settings.journal),
                    prefix_cache=settings.prefix_cache,
                ),
                site=settings.site,
                hardware=hardware,
                model=settings.model,
                drain_timeout_s=settings.drain_timeout_s,
                prepare=lambda reference, told: prepare(reference, cache, told),
                load_engine=load_engine,
                telemetry=telemetry,
            )
            workers.append(worker)
            spare_what_lives()
            await worker.run(stop)
    finally:
        telemetry.close()


def _default_step_tokens(device: str) -> int:
    """A step should take a stage a fraction of a second: that long a decode token may have to wait behind it."""
    return 128 if device == "cpu" else 1024


if __name__ == "__main__":
    raise SystemExit(main())
