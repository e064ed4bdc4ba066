"""What the scheduler's state means to somebody who waits for the first answer. Decisions only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from molink_common.messages import ClusterState, StagePhase, WorkerState

UNFIT = "unfit"


def news(before: ClusterState | None, now: ClusterState, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """For each of our workers that came a step further: its name and what it has come to."""
    earlier = {worker.worker: _milestone(worker) for worker in before.workers} if before is not None else {}
    lines = []
    for worker in now.workers:
        line = _milestone(worker)
        if worker.worker in names and line is not None and line != earlier.get(worker.worker):
            lines.append((names[worker.worker], line))
    return lines


def _milestone(worker: WorkerState) -> str | None:
    """What a worker has come to, without the numbers that move all the time."""
    stage = worker.stage
    if stage is None:
        return None
    layers = f"layers {stage.first_layer} to {stage.last_layer - 1}"
    match stage.phase:
        case StagePhase.LOADING:
            return f"loading {layers}"
        case StagePhase.READY:
            return f"{layers} ready"
        case StagePhase.FAILED:
            return f"{layers} failed"


def still_missing(state: ClusterState | None, names: Mapping[str, str]) -> str:
    """What the system waits for, in words."""
    if state is None:
        return "the scheduler says nothing yet"
    here = {worker.worker for worker in state.workers}
    parts = [f"{name} has not joined" for worker, name in names.items() if worker not in here]
    parts += _unready(state, names)
    return "; ".join(parts) or state.reason


def _unready(state: ClusterState, names: Mapping[str, str]) -> Iterator[str]:
    for worker in state.workers:
        name, stage = names.get(worker.worker, worker.worker), worker.stage
        if stage is None:
            yield f"{name} is {worker.role} ({worker.reason})"
        elif stage.phase is not StagePhase.READY:
            yield f"{name} is {stage.phase} {stage.progress:.0%}"


def hopeless(state: ClusterState, names: Mapping[str, str]) -> str | None:
    """Why our workers will never serve, or None while they still may.

    All of them were started with the same settings on the same machine, so one that cannot serve is no passing
    thing.
    """
    for worker in state.workers:
        name = names.get(worker.worker)
        if name is None:
            continue
        if worker.role == UNFIT:
            return f"{name} cannot serve: {worker.reason}"
        if worker.stage is not None and worker.stage.phase is StagePhase.FAILED:
            return f"{name} cannot load its layers: {worker.stage.problem or worker.reason}"
    return None
