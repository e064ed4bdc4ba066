"""Does one fault, mends it as an operator would, and waits until the system is whole again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import assert_never

from bench.fault_lab.noticing import noticed_after_s
from bench.fault_lab.parts import NATS, REDIS
from bench.fault_lab.plan import Fault, FaultKind, stage_place
from bench.fault_lab.system import ChaosSystem

_WARM_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSeen:
    """A fault that was done, and what became of it. Times are seconds on the driver's monotonic clock."""

    kind: FaultKind
    target: str
    done_s: float
    whole_s: float
    """When everything was in its place again, or waiting for that was given up."""
    noticed_after_s: float | None
    sent_bytes: int
    """By all workers until then, the streams' own traffic among it."""
    was_warm: bool
    """Whether an idle worker had the stages in memory when it was done."""
    still_missing: str | None
    """What was not in its place after the longest wait."""


async def do_fault(system: ChaosSystem, fault: Fault, *, whole_within_s: float) -> FaultSeen | None:
    """Do it, mend it, wait. None: there was nobody to do it to."""
    target = await _target(system, fault)
    if target is None:
        return None
    was_warm, log_sizes = await system.is_warm(), system.log_sizes()
    sent_before = system.sent_bytes
    done_s, done_at_s = time.monotonic(), time.time()
    await _break_and_mend(system, fault, target)
    missing = await system.until_whole(whole_within_s)
    whole_s, sent_bytes = time.monotonic(), system.sent_bytes - sent_before
    if missing is None:
        await system.until_whole(_WARM_WITHIN_S, warm_within_s=_WARM_WITHIN_S)
    return FaultSeen(
        kind=fault.kind,
        target=target,
        done_s=done_s,
        whole_s=whole_s,
        sent_bytes=sent_bytes,
        noticed_after_s=noticed_after_s(fault.kind, target, done_at_s, system.scheduler_events(log_sizes)),
        was_warm=was_warm,
        still_missing=missing,
    )


async def _target(system: ChaosSystem, fault: Fault) -> str | None:
    """Whom it is done to, as things stand now."""
    match fault.kind:
        case FaultKind.KILL_SCHEDULER:
            return system.active_scheduler()
        case FaultKind.RESTART_NATS:
            return NATS
        case FaultKind.RESTART_REDIS:
            return REDIS
        case FaultKind.KILL_GATEWAY:
            return fault.choose(system.plan.gateway_names)
        case _:
            return await _target_worker(system, fault)


async def _target_worker(system: ChaosSystem, fault: Fault) -> str | None:
    state = await system.state()
    if state is None or not state.pipelines:
        return None
    stages = state.pipelines[0].stages
    if fault.kind in (FaultKind.HOLD_LINK, FaultKind.CLOSE_LINK):
        return fault.choose(stages)
    place = stage_place(fault.kind, len(stages), fault.pick)
    if place is not None:
        return stages[place]
    serving = {worker for pipeline in state.pipelines for worker in pipeline.stages}
    return fault.choose([name for name in system.plan.worker_names if name not in serving])


async def _break_and_mend(system: ChaosSystem, fault: Fault, target: str) -> None:
    match fault.kind:
        case FaultKind.STOP_HEAD | FaultKind.STOP_MIDDLE | FaultKind.STOP_TAIL | FaultKind.STOP_STANDBY:
            system.processes.stop(target)
            await asyncio.sleep(fault.lasts_s)
            system.processes.wake(target)
        case FaultKind.HOLD_LINK:
            system.links[target].hold()
            await asyncio.sleep(fault.lasts_s)
            system.links[target].mend()
        case FaultKind.CLOSE_LINK:
            system.links[target].close()
            await asyncio.sleep(fault.lasts_s)
            system.links[target].mend()
        case (
            FaultKind.KILL_HEAD
            | FaultKind.KILL_MIDDLE
            | FaultKind.KILL_TAIL
            | FaultKind.KILL_STANDBY
            | FaultKind.KILL_SCHEDULER
            | FaultKind.KILL_GATEWAY
            | FaultKind.RESTART_NATS
            | FaultKind.RESTART_REDIS
        ):
            system.processes.kill(target)
            await asyncio.sleep(fault.lasts_s)
            await system.start_again(target)
        case _:
            assert_never(fault.kind)
