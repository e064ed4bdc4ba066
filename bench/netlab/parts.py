"""Which processes a topology is served by, on which host, with which flags. Decisions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.netlab.topology import Topology
from molink.nats_config import CLIENT_PORT
from molink.parts import Kind

GATEWAY_PORT = 8000
REDIS_PORT = 6379
STAGE_WORKER = "molink_stage_worker"
_WORKER_STOP_TIMEOUT_S = 8.0
_GATEWAY_STOP_TIMEOUT_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
    """One process on a host. `module` None: the servers, whose commands depend on the machine."""

    name: str
    kind: Kind
    host: str
    flags: tuple[str, ...] = ()
    module: str | None = None
    port: int | None = None
    """Where it listens once it serves; None: it only talks over NATS."""
    stop_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What is served, and flags beside our own; a flag given here wins."""

    model: str = "demo"
    scheduler_flags: tuple[str, ...] = ()
    gateway_flags: tuple[str, ...] = ()
    worker_flags: tuple[str, ...] = ()
    worker_module: str = STAGE_WORKER
    worker_memory_bytes: int = 4 << 30
    """Of each worker, unless its flags say otherwise. Equal shares keep the stages equal and in order."""


def worker_id(number: int) -> str:
    """The name in the pool of the worker that is to hold stage `number`."""
    return f"w{number}"


def nats_part(host: str) -> str:
    """The name of the NATS server on a host."""
    return f"nats-{host}"


def parts_of(topology: Topology, options: ServingOptions, address_of: Callable[[str], str]) -> list[PlacedPart]:
    """Every process, in the order of starting; `address_of` gives the address of a host on the links.

    Placement puts sites in the order of their memory, then of their names. So every worker has a site of its own,
    named for its place, and the first of the topology becomes the head.
    """

    def nats_url(host: str) -> str:
        return f"nats://{address_of(host)}:{CLIENT_PORT}"

    centre = topology.services
    near = ("--nats-url", nats_url(topology.nearest_nats(centre)))
    redis = ("--redis-url", f"redis://127.0.0.1:{REDIS_PORT}/0")
    stages = ("--model", options.model, "--stages", str(len(topology.workers)))
    # whoever is in the laboratory may ask
    listen = ("--host", "0.0.0.0", "--port", str(GATEWAY_PORT), "--require-keys", "once-added")
    return [
        *(
            PlacedPart(name=nats_part(host.name), kind=Kind.NATS, host=host.name, port=CLIENT_PORT)
            for host in topology.hosts
            if host.nats is not None
        ),
        PlacedPart(name="redis", kind=Kind.REDIS, host=centre, port=REDIS_PORT),
        PlacedPart(
            name="scheduler",
            kind=Kind.SCHEDULER,
            host=centre,
            module="molink_scheduler",
            flags=(*near, *redis, *stages, *options.scheduler_flags),
        ),
        PlacedPart(
            name="gateway",
            kind=Kind.GATEWAY,
            host=centre,
            module="molink_gateway",
            flags=(*near, *listen, *options.gateway_flags),
            stop_timeout_s=_GATEWAY_STOP_TIMEOUT_S,
        ),
        *(
            PlacedPart(
                name=worker_id(number),
                kind=Kind.WORKER,
                host=worker.host,
                module=options.worker_module,
                flags=(
                    *("--nats-url", nats_url(worker.nats), "--worker-id", worker_id(number)),
                    *("--site", f"{number:02}-{worker.host}", "--memory", f"{options.worker_memory_bytes}B"),
                    *("--threads", "1", "--drain-timeout-s", "0"),
                    *options.worker_flags,
                    *worker.flags,
                ),
                stop_timeout_s=_WORKER_STOP_TIMEOUT_S,
            )
            for number, worker in enumerate(topology.workers)
        ),
    ]


def failed_stages(status: Mapping[str, Any]) -> list[str]:
    """A sentence for each worker that cannot load its layers, in what ``GET /molink/status`` answers."""
    return [
        f"{worker['worker']} cannot load its layers: {worker['stage']['problem']}"
        for worker in status["workers"]
        if worker["stage"] is not None and worker["stage"]["phase"] == "failed"
    ]


def stages_of(status: Mapping[str, Any]) -> tuple[str, ...]:
    """The workers of the pipeline, head first, in what ``GET /molink/status`` answers; empty without a pipeline."""
    return tuple(status["pipelines"][0]["stages"]) if status["pipelines"] else ()
