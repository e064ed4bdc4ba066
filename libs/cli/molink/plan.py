"""Which processes `molink up` runs, with which flags. Decisions only."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from molink.nats_config import LeafDoor
from molink.parts import Kind, Part
from molink.supervisor import python_command
from molink_common.memory import MEMORY_ENVIRONMENT

_GATEWAY_STOP_TIMEOUT_S = 8.0
"""Open requests get five seconds to finish."""
_WORKER_STOP_TIMEOUT_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What the person wants."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 2
    stages: int | None = None
    """Of a pipeline; None: one on each worker."""
    model: str = "demo"
    dtype: str = "auto"
    device: str = "auto"
    memory_bytes: int | None = None
    """For each worker; None: a share of what is available."""
    threads: int = 1
    """For each worker."""
    nats_url: str | None = None
    """An existing server; None: one of our own."""
    leaf_door: LeafDoor | None = None
    """Where our own server takes the brokers of other sites; None: nowhere, it serves this machine only."""
    redis_url: str | None = None
    otlp_endpoint: str | None = None
    log_folder: Path | None = None
    ready_timeout_s: float = 600.0
    sample: bool = True
    exit_after_ready: bool = False

    @property
    def url(self) -> str:
        """Where clients of this machine reach the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def worker_name(number: int) -> str:
    """What the person reads: ``worker 1``."""
    return f"worker {number}"


def worker_id(number: int, port: int) -> str:
    """The worker's name in the pool: the same after a restart."""
    return f"worker-{number}-of-{port}"


def worker_names(options: UpOptions) -> dict[str, str]:
    """What the person reads, by the worker's name in the pool."""
    return {worker_id(number, options.port): worker_name(number) for number in range(1, options.workers + 1)}


def service_parts(
    options: UpOptions, *, nats_url: str, redis_url: str, worker_memory_bytes: int, logs: Path
) -> list[Part]:
    """Scheduler, gateway and workers, in the order of starting."""
    common = ["--nats-url", nats_url]
    if options.otlp_endpoint is not None:
        common += ["--otlp-endpoint", options.otlp_endpoint]
    return [
        _scheduler(options, [*common, "--redis-url", redis_url], logs),
        _gateway(options, common, logs),
        *(_worker(options, number, common, worker_memory_bytes, logs) for number in range(1, options.workers + 1)),
    ]


def _scheduler(options: UpOptions, common: list[str], logs: Path) -> Part:
    stages = options.stages if options.stages is not None else options.workers
    flags = [*common, "--model", options.model, "--dtype", options.dtype, "--stages", str(stages)]
    return Part(
        name="scheduler",
        kind=Kind.SCHEDULER,
        command=python_command("molink_scheduler", *flags),
        log=logs / "scheduler.log",
    )


def _gateway(options: UpOptions, common: list[str], logs: Path) -> Part:
    flags = [*common, "--host", options.host, "--port", str(options.port)]
    return Part(
        name="gateway",
        kind=Kind.GATEWAY,
        command=python_command("molink_gateway", *flags),
        log=logs / "gateway.log",
        stop_timeout_s=_GATEWAY_STOP_TIMEOUT_S,
    )


def _worker(options: UpOptions, number: int, common: list[str], memory_bytes: int, logs: Path) -> Part:
    flags = [*common, "--worker-id", worker_id(number, options.port), "--device", options.device]
    flags += ["--threads", str(options.threads), "--memory", f"{memory_bytes}B"]
    # when everything stops there is no place to drain to
    flags += ["--drain-timeout-s", "0"]
    return Part(
        name=worker_name(number),
        kind=Kind.WORKER,
        command=python_command("molink_stage_worker", *flags),
        log=logs / f"worker-{number}.log",
        # the thread pools of the numeric libraries are sized when they are loaded
        environment={"OMP_NUM_THREADS": str(options.threads), **MEMORY_ENVIRONMENT},
        stop_timeout_s=_WORKER_STOP_TIMEOUT_S,
    )
