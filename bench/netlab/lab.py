"""Makes a laboratory of network namespaces, and unmakes it whatever happens.

    async with open_lab(topology) as lab:
        subprocess.Popen(lab.command("b", ["ping", lab.link_address("a")]))
        await lab.cut("a", "b")

Each host is a namespace with its links and a management device, by which this process reaches it without crossing a
link. It needs root, network namespaces, and either netem in the kernel or TUN devices and a C compiler.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Literal

from bench.netlab.links import (
    BOTH,
    Counters,
    Direction,
    End,
    Link,
    kernel_has_netem,
    open_tun_link,
    open_veth_link,
)
from bench.netlab.plan import MANAGEMENT_DEVICE, LabPlan
from bench.netlab.registry import LabError, claim_number, run_tool
from bench.netlab.topology import LinkSpec, Topology, TopologyError

Emulator = Literal["netem", "tunlink"]


class Lab:
    """A laboratory that runs. Made by `open_lab`."""

    def __init__(self, plan: LabPlan, links: Mapping[frozenset[str], Link]) -> None:
        self._plan = plan
        self._links = links

    @property
    def topology(self) -> Topology:
        """As it was made; changes of links are not in it."""
        return self._plan.topology

    @property
    def number(self) -> int:
        """Its own among the laboratories that run on this machine."""
        return self._plan.number

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """`argv`, run on a host. The process is the command itself: signals reach it."""
        return ["ip", "netns", "exec", self._plan.namespace(self.topology.host(host).name), *argv]

    @contextlib.asynccontextmanager
    async def program(
        self, host: str, argv: Sequence[str], *, stderr: int | None = None
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """`argv` at `host`, its output in a pipe; killed when left. `stderr` None goes where our own goes."""
        process = await asyncio.create_subprocess_exec(
            *self.command(host, argv), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=stderr, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    def address(self, host: str) -> str:
        """Where this process reaches a host, without crossing a link. Other hosts have no way there."""
        return self._plan.management_address(host)

    def link_address(self, host: str) -> str:
        """Where hosts reach each other, over the links. This process has no way there."""
        return self._plan.link_address(host)

    def device(self, host: str, peer: str) -> str:
        """The name of a host's device on its way to another.

        Raises:
            TopologyError: there is no way.
        """
        for route in self._plan.routes(host):
            if route.to == peer:
                return self._plan.device(route.through)
        raise TopologyError(f"no way leads from {host!r} to {peer!r}")

    async def set_link(self, a: str, b: str, spec: LinkSpec, *, one_way: bool = False) -> None:
        """Change a link while traffic crosses it; `one_way` only from `a` to `b`. Its MTU stays as it was made.

        Raises:
            TopologyError: no link joins them.
            LabError: the link is a LAN, or its emulator does not obey.
        """
        link = self._link(a, b)
        forth: Direction = 0 if a < b else 1
        for direction in (forth,) if one_way else BOTH:
            await link.shape(spec, direction)

    async def cut(self, a: str, b: str) -> None:
        """Lose all that is sent between two hosts. They are not told."""
        await self._link(a, b).cut()

    async def mend(self, a: str, b: str) -> None:
        """Carry again, as shaped."""
        await self._link(a, b).mend()
        for host in (a, b):
            _set_routes(self._plan, host)

    async def counters(self, a: str, b: str) -> tuple[Counters, Counters] | None:
        """From `a` to `b` and back; None where the link is not ours to count."""
        found = await self._link(a, b).counters()
        return found if found is None or a < b else found[::-1]

    def emulator_cpu_s(self, a: str, b: str) -> float | None:
        """Processor time that emulating the link has taken; None where the kernel carries it."""
        return self._link(a, b).cpu_s()

    def _link(self, a: str, b: str) -> Link:
        self.topology.link(a, b)
        return self._links[frozenset((a, b))]


@contextlib.asynccontextmanager
async def open_lab(topology: Topology, *, emulator: Emulator | None = None, seed: int = 1) -> AsyncIterator[Lab]:
    """Make hosts and links; unmake them at the end, also on an exception, Ctrl-C and SIGTERM.

    `emulator` None takes netem where the kernel has it. `seed` decides which packets tunlink loses.

    Raises:
        LabError: this machine does not let us; the message says what is missing.
        CannotBuild: tunlink is needed and there is no C compiler.
    """
    if sys.platform != "linux":
        raise LabError("the network laboratory needs Linux; elsewhere use `python -m bench.netlab.proxy`")
    with _cancelled_by_sigterm(), claim_number() as number:
        plan = LabPlan(number=number, topology=topology)
        for host in topology.hosts:
            _make_host(plan, host.name)
        async with contextlib.AsyncExitStack() as stack:
            links: dict[frozenset[str], Link] = {}
            for offset, (pair, spec) in enumerate(sorted(topology.links.items(), key=lambda item: sorted(item[0]))):
                links[pair] = await _open_link(plan, pair, spec, emulator, seed + offset)
                stack.push_async_callback(links[pair].close)
            for host in topology.hosts:
                _set_routes(plan, host.name)
            yield Lab(plan, links)


def _make_host(plan: LabPlan, host: str) -> None:
    name = plan.namespace(host)
    run_tool("ip", "netns", "add", name)
    settings = {
        "net.ipv4.ip_forward": "1",
        # as docs/topologies.md tells those who own the hosts of brokers
        "net.ipv4.tcp_slow_start_after_idle": "0",
        # one address on several devices: an answer may come back another way than the question went
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.default.rp_filter": "0",
        "net.ipv6.conf.all.disable_ipv6": "1",
        "net.ipv6.conf.default.disable_ipv6": "1",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    run_tool("ip", "netns", "exec", name, "sysctl", "-q", "-w", *words)
    run_tool("ip", "-n", name, "link", "set", "lo", "up")
    outer = plan.outer_device(host)
    run_tool("ip", "link", "add", outer, "type", "veth", "peer", "name", MANAGEMENT_DEVICE, "netns", name)
    run_tool("ip", "address", "add", f"{plan.outer_address(host)}/30", "dev", outer)
    run_tool("ip", "-n", name, "address", "add", f"{plan.management_address(host)}/30", "dev", MANAGEMENT_DEVICE)
    run_tool("ip", "link", "set", outer, "up")
    run_tool("ip", "-n", name, "link", "set", MANAGEMENT_DEVICE, "up")


def _set_routes(plan: LabPlan, host: str) -> None:
    # the congestion control goes with the route: a namespace may not choose one that the machine reserves for root
    way = ("src", plan.link_address(host), "congctl", plan.topology.congestion_control)
    for route in plan.routes(host):
        address, device = plan.link_address(route.to), plan.device(route.through)
        run_tool("ip", "-n", plan.namespace(host), "route", "replace", address, "dev", device, *way)


async def _open_link(
    plan: LabPlan, pair: frozenset[str], spec: LinkSpec | None, emulator: Emulator | None, seed: int
) -> Link:
    a, b = (
        End(
            namespace=plan.namespace(host),
            device=plan.device(peer),
            address=plan.link_address(host),
            far=plan.link_address(peer),
        )
        for host, peer in (sorted(pair), sorted(pair, reverse=True))
    )
    if spec is None:
        return await open_veth_link(a, b, None)
    if emulator == "netem" or (emulator is None and kernel_has_netem(a.namespace)):
        return await open_veth_link(a, b, spec)
    return await open_tun_link(a, b, spec, seed=seed)


@contextlib.contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """SIGTERM cancels the task, as Ctrl-C does, unless somebody handles it already."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    is_ours = (
        task is not None
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_ours or task is None:
        yield
        return
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
