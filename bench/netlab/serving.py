"""The real system on the hosts of a laboratory.

    async with serving(two_hosts(LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.03)), folder) as system:
        await stream_chat(system.port, body, host=system.host)
        system.processes["w1"].kill()

Nothing that ends is started again by itself. Whatever happens, no process outlives the block; should this process be
killed, they die with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.netlab.lab import Lab, open_lab
from bench.netlab.nats_config import nats_config
from bench.netlab.parts import (
    GATEWAY_PORT,
    STAGE_WORKER,
    PlacedPart,
    ServingOptions,
    failed_stages,
    parts_of,
    stages_of,
    worker_id,
)
from bench.netlab.registry import LabError
from bench.netlab.topology import Topology
from molink.embedded import find_nats_server, find_redis_server, is_listening
from molink.leash import Leash, kill_group
from molink.parts import Kind
from molink_common.memory import MEMORY_ENVIRONMENT

_LISTEN_TIMEOUT_S = 20.0
_LOOK_AGAIN_S = 0.05
_LAST_LINES = 12


class DidNotServe(LabError):
    """The system is not ready in time, or ended early. Carries the logs' last lines."""


class OtherOrder(DidNotServe):
    """The scheduler has put the stages on the hosts in another order; where hosts are alike, it is chance."""


class ServingSystem:
    """A system that answers. Made by `serving`."""

    def __init__(
        self, lab: Lab, parts: Sequence[PlacedPart], folder: Path, leash: Leash, extra: Mapping[str, str]
    ) -> None:
        self.lab = lab
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By name: ``nats-a``, ``redis``, ``scheduler``, ``gateway``, ``w0``, ``w1`` …"""
        self._parts = {part.name: part for part in parts}
        self._folder = folder
        self._leash = leash
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **MEMORY_ENVIRONMENT, **extra}

    @property
    def host(self) -> str:
        """The gateway's address for this process; the way there crosses no link."""
        return self.lab.address(self.lab.topology.services)

    @property
    def port(self) -> int:
        """The gateway's port."""
        return GATEWAY_PORT

    @property
    def url(self) -> str:
        """The gateway."""
        return f"http://{self.host}:{self.port}"

    async def status(self) -> dict[str, Any]:
        """What ``molink status --json`` prints."""
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.get(f"{self.url}/molink/status")
            answer.raise_for_status()
            body: dict[str, Any] = answer.json()
            return body

    def log(self, name: str) -> Path:
        """What a part has written."""
        return self._folder / f"{name}.log"

    def start(self, name: str) -> None:
        """Start a part that does not run: at first, or again after it was killed."""
        part = self._parts[name]
        running = self.processes.get(name)
        assert running is None or running.poll() is not None, f"{name} runs"
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                self.lab.command(part.host, self._argv(part)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                # Ctrl-C at the terminal must reach us alone: the parts are stopped in order
                start_new_session=True,
            )
        self._leash.put_on(process.pid)
        self.processes[name] = process

    def _argv(self, part: PlacedPart) -> list[str]:
        match part.kind:
            case Kind.NATS:
                config = self._folder / f"{part.name}.conf"
                config.write_text(nats_config(self.lab.topology, part.host, self.lab.link_address))
                return [str(find_nats_server()), "-c", str(config)]
            case Kind.REDIS:
                address = ["--port", str(part.port), "--bind", "0.0.0.0", "--protected-mode", "no"]
                return [str(find_redis_server()), *address, "--save", "", "--dir", str(self._folder)]
            case _:
                assert part.module is not None
                return [sys.executable, "-m", part.module, *part.flags]

    async def until_listening(self, name: str) -> None:
        """Return once a part accepts connections.

        Raises:
            DidNotServe: it ended, or does not within 20 s.
        """
        part = self._parts[name]
        assert part.port is not None, f"{name} listens"
        deadline_s = asyncio.get_running_loop().time() + _LISTEN_TIMEOUT_S
        while not is_listening(part.port, self.lab.address(part.host)):
            await self._wait_on(f"{name} does not listen", deadline_s)

    async def until_ready(self, timeout_s: float) -> None:
        """Return once a request can be answered.

        Raises:
            DidNotServe: a part ended, or it takes longer.
        """
        reason = "no answer"
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                try:
                    answer = await client.get(f"{self.url}/ready")
                    if answer.status_code == httpx.codes.OK:
                        return
                    reason = answer.text
                    if failed := failed_stages(await self._status_if_any(client)):
                        raise DidNotServe("; ".join(failed))
                except httpx.TransportError as error:
                    reason = str(error) or type(error).__name__
                await self._wait_on(f"not ready: {reason}", deadline_s)

    async def _status_if_any(self, client: httpx.AsyncClient) -> dict[str, Any]:
        answer = await client.get(f"{self.url}/molink/status")
        body: dict[str, Any] = answer.json() if answer.status_code == httpx.codes.OK else {"workers": []}
        return body

    async def _wait_on(self, problem: str, deadline_s: float) -> None:
        """A short pause, as neither ports nor HTTP can tell us; or the end of waiting."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise DidNotServe(f"{name} ended with code {process.returncode}:\n{self._last_lines([name])}")
        if asyncio.get_running_loop().time() > deadline_s:
            raise DidNotServe(f"{problem}\n{self._last_lines(list(self.processes))}")
        await asyncio.sleep(_LOOK_AGAIN_S)

    def _last_lines(self, names: Sequence[str]) -> str:
        ends = (self.log(name).read_text(errors="replace").splitlines()[-_LAST_LINES:] for name in names)
        return "\n".join(f"--- {self.log(name)}\n" + "\n".join(end) for name, end in zip(names, ends, strict=True))

    async def stop(self) -> None:
        """End everything in order: each gets its time, then is killed."""
        try:
            for kind in Kind:
                names = [name for name in self.processes if self._parts[name].kind is kind]
                for name in names:
                    self.processes[name].terminate()
                for name in names:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        await asyncio.to_thread(self.processes[name].wait, self._parts[name].stop_timeout_s)
        finally:
            for process in self.processes.values():
                if process.poll() is None:
                    kill_group(process.pid)
                    process.wait()
                self._leash.take_off(process.pid)


@contextlib.asynccontextmanager
async def serving(
    topology: Topology,
    folder: Path,
    *,
    model: str = "demo",
    scheduler_flags: Sequence[str] = (),
    gateway_flags: Sequence[str] = (),
    worker_flags: Sequence[str] = (),
    worker_module: str = STAGE_WORKER,
    environment: Mapping[str, str] | None = None,
    ready_timeout_s: float = 300.0,
) -> AsyncIterator[ServingSystem]:
    """Start NATS, Redis, scheduler, gateway and workers where the topology says; stop them at the end.

    Logs and configurations go to `folder`. `environment` is beside what this process has. Flags come after our own,
    so they win; those of one worker, in the topology, come last.

    Raises:
        DidNotServe, LabError, ServerNotFound
    """
    options = ServingOptions(
        model=model,
        scheduler_flags=tuple(scheduler_flags),
        gateway_flags=tuple(gateway_flags),
        worker_flags=tuple(worker_flags),
        worker_module=worker_module,
    )
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  nothing else runs yet
    if worker_module == STAGE_WORKER:
        await _prepare(model, environment or {})
    async with open_lab(topology) as lab:
        parts = parts_of(topology, options, lab.link_address)
        with Leash() as leash:
            system = ServingSystem(lab, parts, folder, leash, environment or {})
            try:
                for part in parts:
                    system.start(part.name)
                    if part.kind in (Kind.NATS, Kind.REDIS):
                        await system.until_listening(part.name)
                await system.until_ready(ready_timeout_s)
                _check_order(topology, await system.status())
                yield system
            finally:
                await system.stop()


async def _prepare(model: str, extra: Mapping[str, str]) -> None:
    """Fetch and convert the model here, outside: the hosts have no way to the Internet."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "molink_stage_worker.models", "--", model),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **extra},
    )
    try:
        said, _ = await process.communicate()
        if process.returncode != 0:
            raise DidNotServe(f"the model cannot be had: {said.decode(errors='replace')[-500:]}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _check_order(topology: Topology, status: Mapping[str, Any]) -> None:
    if all(link is None for link in topology.links.values()):
        return  # on one LAN any order is as good
    stages = stages_of(status)
    wanted = tuple(worker_id(number) for number in range(len(topology.workers)))
    if topology.is_mesh_of_one_kind and stages[:1] == wanted[:1]:
        return  # whoever follows the head, which is where the services are
    if stages != wanted[: len(stages)]:
        raise OtherOrder(f"the stages are on {stages}, head first, but the topology wants {wanted}")
