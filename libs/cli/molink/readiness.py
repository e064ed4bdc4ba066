"""What the scheduler's state means to somebody who waits for the first answer. Decisions only."""

from __future__ import annotations

from collections.abc import Iterator

from molink_common.messages import ClusterState, StagePhase, WorkerState

UNFIT = "unfit"


def news(before: ClusterState | None, now: ClusterState) -> list[str]:
    """One line for each worker whose place in the system changed."""
    earlier = {worker.worker: _milestone(worker) for worker in before.workers} if before is not None else {}
    lines = []
    for worker in now.workers:
        line = _milestone(worker)
        if line != earlier.get(worker.worker):
            lines.append(f"{worker.worker}: {line}")
    return lines


def _milestone(worker: WorkerState) -> str:
    """What a worker has come to, without the numbers that move all the time."""
    stage = worker.stage
    if stage is None:
        return worker.role if worker.role != UNFIT else f"{worker.role}: {worker.reason}"
    layers = f"layers {stage.first_layer} to {stage.last_layer - 1}"
    match stage.phase:
        case StagePhase.LOADING:
            return f"loading {layers}"
        case StagePhase.READY:
            return f"{layers} ready on {worker.device}"
        case StagePhase.FAILED:
            return f"{layers} failed: {stage.problem or worker.reason}"


def still_missing(state: ClusterState | None, expected_workers: int) -> str:
    """What the system waits for, in words."""
    if state is None:
        return "the scheduler says nothing yet"
    parts = list(_unready(state))
    if len(state.workers) < expected_workers:
        parts.insert(0, f"{len(state.workers)} of {expected_workers} workers have joined")
    return "; ".join(parts) or state.reason


def _unready(state: ClusterState) -> Iterator[str]:
    for worker in state.workers:
        stage = worker.stage
        if stage is None:
            yield f"{worker.worker} is {worker.role} ({worker.reason})"
        elif stage.phase is not StagePhase.READY:
            yield f"{worker.worker} is {stage.phase} {stage.progress:.0%}"


def hopeless(state: ClusterState) -> str | None:
    """Why this system will never be ready, or None while it still may.

    Every worker here was started with the same settings on the same machine, so one that cannot serve is no
    passing thing.
    """
    for worker in state.workers:
        if worker.role == UNFIT:
            return f"{worker.worker} cannot serve: {worker.reason}"
        if worker.stage is not None and worker.stage.phase is StagePhase.FAILED:
            return f"{worker.worker} cannot load its layers: {worker.stage.problem or worker.reason}"
    return None
