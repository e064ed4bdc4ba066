"""Which processes are run, with which flags. Decisions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.netlab.topology import LinkSpec
from molink.embedded import find_redis_server
from molink.parts import Kind, Part
from molink.supervisor import python_command
from molink_common.memory import MEMORY_ENVIRONMENT
from molink_common.messages import ClusterState, Heartbeat, LayerRange

NATS = "nats"
REDIS = "redis"
_FRESH_S = 1.6
"""A worker whose last heartbeat is older is not well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run."""

    model: str = "demo"
    dtype: str = "float32"
    workers: int = 4
    stages: int = 3
    schedulers: int = 2
    gateways: int = 2
    worker_memory_bytes: int = 3 << 30
    worker_module: str = "molink_stage_worker"
    scheduler_flags: tuple[str, ...] = ()
    gateway_flags: tuple[str, ...] = ()
    worker_flags: tuple[str, ...] = ()
    link: LinkSpec | None = None
    """From one worker to another, by way of NATS. Each worker's own link has half of its round trip."""

    @property
    def worker_names(self) -> tuple[str, ...]:
        """Processes and names in the pool alike."""
        return tuple(f"worker-{number}" for number in range(1, self.workers + 1))

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """Which of them is active shows only later."""
        return tuple(f"scheduler-{number}" for number in range(1, self.schedulers + 1))

    @property
    def gateway_names(self) -> tuple[str, ...]:
        """All serve."""
        return tuple(f"gateway-{number}" for number in range(1, self.gateways + 1))


def redis_part(logs: Path, port: int) -> Part:
    """A Redis-protocol server that finds its data again when it is started after a kill."""
    command = (
        *(str(find_redis_server()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(logs)),
        *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
    )
    return Part(name=REDIS, kind=Kind.REDIS, command=command, log=logs / "redis.log", port=port)


def nats_part(logs: Path, port: int, command: tuple[str, ...]) -> Part:
    """The pool's broker."""
    return Part(name=NATS, kind=Kind.NATS, command=command, log=logs / "nats.log", port=port)


def service_parts(
    plan: Plan,
    *,
    nats_port: int,
    redis_port: int,
    link_ports: Mapping[str, int],
    gateway_ports: Sequence[int],
    logs: Path,
) -> list[Part]:
    """Schedulers, gateways and workers. Each worker reaches NATS over a link of its own, by `link_ports`."""
    nats = ("--nats-url", f"nats://127.0.0.1:{nats_port}")
    redis = ("--redis-url", f"redis://127.0.0.1:{redis_port}/0")
    model = ("--model", plan.model, "--dtype", plan.dtype, "--stages", str(plan.stages))
    parts = [
        _part(name, Kind.SCHEDULER, logs, "molink_scheduler", *nats, *redis, *model, *plan.scheduler_flags)
        for name in plan.scheduler_names
    ]
    for name, port in zip(plan.gateway_names, gateway_ports, strict=True):
        flags = (*nats, "--gateway-id", name, "--port", str(port), *plan.gateway_flags)
        parts.append(_part(name, Kind.GATEWAY, logs, "molink_gateway", *flags, port=port))
    for name in plan.worker_names:
        flags = ("--nats-url", f"nats://127.0.0.1:{link_ports[name]}", "--worker-id", name, "--threads", "1")
        flags = (*flags, "--memory", f"{plan.worker_memory_bytes}B", *plan.worker_flags)
        parts.append(_part(name, Kind.WORKER, logs, plan.worker_module, *flags))
    return parts


def _part(name: str, kind: Kind, logs: Path, module: str, *flags: str, port: int | None = None) -> Part:
    return Part(
        name=name,
        kind=kind,
        command=python_command(module, *flags),
        log=logs / f"{name}.log",
        environment={"OMP_NUM_THREADS": "1", **MEMORY_ENVIRONMENT},
        port=port,
    )


def what_is_missing(state: ClusterState, plan: Plan) -> str | None:
    """Why the system is not whole: every worker there, one pipeline ready, nobody leaving; None: it is."""
    if not state.ready:
        return state.reason
    if not state.pipelines or not state.pipelines[0].ready or len(state.pipelines[0].stages) != plan.stages:
        return "the pipeline is not ready"
    known = {worker.worker: worker for worker in state.workers}
    for name in plan.worker_names:
        worker = known.get(name)
        if worker is None:
            return f"{name} is not there"
        if worker.silent_s > _FRESH_S:
            return f"{name} has been silent for {worker.silent_s:.1f} s"
        if worker.role in ("preparing", "unfit"):
            return f"{name} is {worker.role}: {worker.reason}"
    return None


def cold_stages(state: ClusterState, heartbeats: Mapping[str, Heartbeat]) -> list[LayerRange]:
    """The pipeline's stages whose weights no idle worker has in memory."""
    pipeline = state.pipelines[0]
    warm = {
        layers
        for worker, heartbeat in heartbeats.items()
        if worker not in pipeline.stages
        for layers in heartbeat.preloaded
    }
    return [layers for layers in pipeline.layers if layers not in warm]
