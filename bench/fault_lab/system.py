"""The whole system on this machine, every part a process of its own that can be killed.

async with running_system(plan, logs) as system:
    assert await system.until_whole(timeout_s=300) is None
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx

from bench.fault_lab.links import CuttableLink, open_link
from bench.fault_lab.noticing import Event, active_scheduler, read_events, standing_by
from bench.fault_lab.parts import NATS, REDIS, Plan, cold_stages, nats_part, redis_part, service_parts, what_is_missing
from bench.fault_lab.processes import DidNotRun, Processes
from bench.netlab.proxy import open_proxy
from molink.embedded import free_port, nats_command
from molink_common import messages, subjects
from molink_common.bus import Bus, BusSettings, Incoming, open_bus
from molink_common.errors import BusError, ProtocolError
from molink_common.messages import AskState, ClusterState, Heartbeat

_ASK_TIMEOUT_S = 1.0
_LOOK_AGAIN_S = 0.1


class ChaosSystem:
    """A system that runs, and its operator. Made by `running_system`."""

    def __init__(
        self,
        plan: Plan,
        processes: Processes,
        links: Mapping[str, CuttableLink],
        bus: Bus,
        gateway_ports: tuple[int, ...],
    ) -> None:
        self.plan = plan
        self.processes = processes
        self.links = links
        self.gateway_ports = gateway_ports
        self.heartbeats: dict[str, Heartbeat] = {}
        self._bus = bus
        self.accidents: list[str] = []
        """A sentence for each part that ended without having been killed."""

    @property
    def sent_bytes(self) -> int:
        """By all workers since they began."""
        return sum(link.sent_bytes for link in self.links.values())

    async def follow_heartbeats(self) -> None:
        """From now on `heartbeats` are the last ones."""

        async def take(incoming: Incoming) -> None:
            with contextlib.suppress(ProtocolError):
                heartbeat = messages.decode(incoming.data, Heartbeat)
                self.heartbeats[heartbeat.worker] = heartbeat

        await self._bus.subscribe(subjects.ALL_HEARTBEATS, take)

    async def start_again(self, name: str) -> None:
        """Start a part that was killed."""
        self.processes.start(self.processes.part(name))
        if name in (NATS, REDIS):
            await self.processes.until_listening(name)

    async def state(self) -> ClusterState | None:
        """What the active scheduler says now; None: it says nothing."""
        try:
            return await self._bus.ask(subjects.STATUS, AskState(), ClusterState, timeout_s=_ASK_TIMEOUT_S)
        except (BusError, ProtocolError):
            return None

    async def until_whole(self, timeout_s: float, *, warm_within_s: float = 0.0) -> str | None:
        """Wait until everything is in its place; gives what still is not after `timeout_s`, or None.

        Then wait a little longer, `warm_within_s`, for an idle worker to have the stages in memory.
        """
        deadline_s = time.monotonic() + timeout_s
        while (missing := await self._missing()) is not None:
            if time.monotonic() > deadline_s:
                return missing
            await asyncio.sleep(_LOOK_AGAIN_S)  # nobody tells of all this together
        deadline_s = time.monotonic() + warm_within_s
        while time.monotonic() < deadline_s and not await self.is_warm():  # noqa: ASYNC110  neither of this
            await asyncio.sleep(_LOOK_AGAIN_S)
        return None

    async def is_warm(self) -> bool:
        """Whether each stage of the pipeline is in some idle worker's memory."""
        state = await self.state()
        return state is not None and bool(state.pipelines) and not cold_stages(state, self.heartbeats)

    async def _missing(self) -> str | None:
        self.accidents += self.processes.restart_ended()
        if (scheduler := self._missing_scheduler()) is not None:
            return scheduler
        state = await self.state()
        if state is None:
            return "no scheduler answers"
        return what_is_missing(state, self.plan) or await self._missing_gateway()

    def _missing_scheduler(self) -> str | None:
        events = self.scheduler_events({})
        active = self.active_scheduler(events)
        if active is None:
            return "no scheduler is active"
        for name in self.plan.scheduler_names:
            since_s = self.processes.started_at_s[name]
            if not self.processes.is_running(name) or (name != active and not standing_by(events, name, since_s)):
                return f"{name} does not stand by"
        return None

    async def _missing_gateway(self) -> str | None:
        async with httpx.AsyncClient(timeout=_ASK_TIMEOUT_S, trust_env=False) as client:
            for name, port in zip(self.plan.gateway_names, self.gateway_ports, strict=True):
                try:
                    answer = await client.get(f"http://127.0.0.1:{port}/ready")
                except httpx.HTTPError:
                    return f"{name} does not answer"
                if answer.status_code != httpx.codes.OK:
                    return f"{name} is not ready: {answer.text[:200]}"
        return None

    def active_scheduler(self, events: list[Event] | None = None) -> str | None:
        """The name of the one that serves, as far as its log tells."""
        running = [name for name in self.plan.scheduler_names if self.processes.is_running(name)]
        return active_scheduler(self.scheduler_events({}) if events is None else events, running)

    def log_sizes(self) -> dict[str, int]:
        """Of the schedulers' logs, to read from there later."""
        return {name: self.processes.part(name).log.stat().st_size for name in self.plan.scheduler_names}

    def scheduler_events(self, since: Mapping[str, int]) -> list[Event]:
        """What the schedulers have logged after these sizes."""
        events = []
        for name in self.plan.scheduler_names:
            with self.processes.part(name).log.open("rb") as log:
                log.seek(since.get(name, 0))
                events += read_events(name, log.read().decode(errors="replace"))
        return events


@contextlib.asynccontextmanager
async def running_system(plan: Plan, logs: Path) -> AsyncIterator[ChaosSystem]:
    """Start every part; at the end all of them are killed. Logs go to `logs`.

    Raises:
        DidNotRun, ServerNotFound
    """
    nats_port, redis_port = free_port(), free_port()
    gateway_ports = tuple(free_port() for _ in plan.gateway_names)
    async with contextlib.AsyncExitStack() as stack:
        links: dict[str, CuttableLink] = {}
        for name in plan.worker_names:
            port = nats_port
            if plan.link is not None:
                slow = open_proxy(
                    ("127.0.0.1", 0),
                    ("127.0.0.1", nats_port),
                    rate_bit_per_s=plan.link.rate_bit_per_s,
                    round_trip_s=plan.link.round_trip_s / 2,
                )
                _, port = await stack.enter_async_context(slow)
            links[name] = await stack.enter_async_context(open_link(port))
        processes = stack.enter_context(Processes.open())
        for part in (nats_part(logs, nats_port, nats_command(logs, nats_port)), redis_part(logs, redis_port)):
            processes.start(part)
            await processes.until_listening(part.name)
        for part in service_parts(
            plan,
            nats_port=nats_port,
            redis_port=redis_port,
            link_ports={name: link.port for name, link in links.items()},
            gateway_ports=gateway_ports,
            logs=logs,
        ):
            processes.start(part)
        settings = BusSettings(url=f"nats://127.0.0.1:{nats_port}")
        bus = await stack.enter_async_context(open_bus(settings, name="faults"))
        system = ChaosSystem(plan, processes, links, bus, gateway_ports)
        await system.follow_heartbeats()
        yield system


__all__ = ["ChaosSystem", "DidNotRun", "running_system"]
