"""The links of a laboratory while it runs: a user-space emulator, the kernel's netem, or a plain pair of devices.

Direction 0 is from end `a` to end `b`, 1 the way back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bench.netlab.build import tunlink_binary
from bench.netlab.registry import LabError, run_tool
from bench.netlab.topology import LinkSpec

_ANSWER_TIMEOUT_S = 10.0
_UNBOUNDED_BYTES = 1 << 40
_NETEM_MOST_PACKETS = 100_000

Direction = Literal[0, 1]
BOTH: tuple[Direction, ...] = (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A device in a namespace, with its host's address; `far` is the address at the other end."""

    namespace: str
    device: str
    address: str
    far: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """One direction of an emulated link since its start. `overflow`: dropped for want of room in the emulator."""

    packets: int
    bytes: int
    full: int
    lost: int
    cut: int
    overflow: int


class Link(Protocol):
    """What can be done to a link while traffic crosses it."""

    async def shape(self, spec: LinkSpec, direction: Direction) -> None:
        """Change rate, delay, queue and loss of a direction."""

    async def cut(self) -> None:
        """Lose everything, both ways."""

    async def mend(self) -> None:
        """Carry again."""

    async def counters(self) -> tuple[Counters, Counters] | None:
        """Both directions; None where nobody counts."""

    def cpu_s(self) -> float | None:
        """Processor time of the emulator so far; None without one."""

    async def close(self) -> None:
        """End what carries it."""


class TunLink:
    """A link through `tunlink`, a process of ours that dies with us. Made by `open_tun_link`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()

    async def until_ready(self) -> None:
        """Return once its devices exist.

        Raises:
            LabError: it says why it cannot make them, or nothing in time.
        """
        assert self._process.stdout is not None and self._process.stderr is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                if await self._process.stdout.readline() == b"ready\n":
                    return
                raise LabError(f"the link emulator ended: {(await self._process.stderr.read()).decode().strip()}")
        raise LabError("the link emulator does not start")

    async def shape(self, spec: LinkSpec, direction: Direction) -> None:
        """Takes effect for packets that have not begun to be sent."""
        for name, value in shape_words(spec).items():
            await self._order(f"{name} {direction} {value}")

    async def cut(self) -> None:
        """What is queued or on its way is lost too."""
        await self._order("down *")

    async def mend(self) -> None:
        """Carry again, as shaped."""
        await self._order("up *")

    async def counters(self) -> tuple[Counters, Counters] | None:
        """Both directions."""
        lines = await self._order("stats")
        there, back = (read_counters(line) for line in lines)
        return there, back

    def cpu_s(self) -> float | None:
        """User and system time."""
        # proc(5): the fields after the name, which is in parentheses; utime and stime are the 14th and 15th of all
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def _order(self, command: str) -> list[str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        lines: list[str] = []
        try:
            async with self._turn, asyncio.timeout(_ANSWER_TIMEOUT_S):
                self._process.stdin.write(command.encode() + b"\n")
                await self._process.stdin.drain()
                while line := (await self._process.stdout.readline()).decode().strip():
                    if line == "ok":
                        return lines
                    if line.startswith("error"):
                        raise LabError(f"the link emulator refuses `{command}`: {line}")
                    lines.append(line)
        except (TimeoutError, ConnectionError):
            pass
        raise LabError(f"the link emulator does not answer `{command}`; it has ended or hangs")

    async def close(self) -> None:
        """Its devices vanish with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


async def open_tun_link(a: End, b: End, spec: LinkSpec, *, seed: int) -> TunLink:
    """Start the emulator and bring its devices up.

    Raises:
        CannotBuild, LabError
    """
    shape = [f"{name}={value}" for name, value in shape_words(spec).items()]
    process = await asyncio.create_subprocess_exec(
        *(str(tunlink_binary()), a.namespace, a.device, b.namespace, b.device),
        *shape,
        f"mtu={spec.mtu_bytes}",
        f"seed={seed}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    link = TunLink(process)
    try:
        await link.until_ready()
        for end in (a, b):
            _bring_up(end)
    except BaseException:
        await link.close()
        raise
    return link


class VethLink:
    """A pair of virtual Ethernet devices: a LAN, or with the kernel's netem at both ends. Made by `open_veth_link`."""

    def __init__(self, ends: tuple[End, End], *, has_netem: bool) -> None:
        self._ends = ends
        self._has_netem = has_netem
        self._specs = [LinkSpec(), LinkSpec()]

    async def shape(self, spec: LinkSpec, direction: Direction) -> None:
        """Takes effect at once."""
        if not self._has_netem:
            raise LabError("a LAN link has no shaper; give it a LinkSpec() in the topology to shape it later")
        self._specs[direction] = spec
        self._set_netem(direction, netem_words(spec))

    def _set_netem(self, direction: Direction, words: list[str]) -> None:
        end = self._ends[direction]
        run_tool("tc", "-n", end.namespace, "qdisc", "replace", "dev", end.device, "root", "netem", *words)

    async def cut(self) -> None:
        """What is on its way arrives; nothing more does."""
        if self._has_netem:
            for direction in BOTH:
                self._set_netem(direction, ["loss", "100%"])
        else:
            run_tool("ip", "-n", self._ends[0].namespace, "link", "set", self._ends[0].device, "down")

    async def mend(self) -> None:
        """Carry again, as shaped."""
        if self._has_netem:
            for direction in BOTH:
                self._set_netem(direction, netem_words(self._specs[direction]))
        else:
            run_tool("ip", "-n", self._ends[0].namespace, "link", "set", self._ends[0].device, "up")

    async def counters(self) -> tuple[Counters, Counters] | None:
        """None: the kernel keeps them."""
        return None

    def cpu_s(self) -> float | None:
        """None: no process carries it."""
        return None

    async def close(self) -> None:
        """The devices vanish with their namespaces."""


async def open_veth_link(a: End, b: End, spec: LinkSpec | None) -> VethLink:
    """Make the pair; with a spec, shape it with netem.

    Raises:
        LabError
    """
    run_tool(
        *("ip", "-n", a.namespace, "link", "add", a.device, "type", "veth"),
        *("peer", "name", b.device, "netns", b.namespace),
    )
    for end in (a, b):
        if spec is not None:
            # netem counts a segment that the kernel has not cut yet as one packet
            run_tool("ip", "-n", end.namespace, "link", "set", end.device, "gso_max_segs", "1")
        _bring_up(end)
    link = VethLink((a, b), has_netem=spec is not None)
    if spec is not None:
        for direction in BOTH:
            await link.shape(spec, direction)
    return link


def _bring_up(end: End) -> None:
    words = ("address", "add", end.address, "peer", end.far, "dev", end.device, "noprefixroute")
    run_tool("ip", "-n", end.namespace, *words)
    run_tool("ip", "-n", end.namespace, "link", "set", end.device, "up")


def kernel_has_netem(namespace: str) -> bool:
    """Tried on the loopback device of a namespace that is ours."""
    try:
        run_tool("tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except LabError:
        return False
    run_tool("tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root")
    return True


def shape_words(spec: LinkSpec) -> dict[str, int]:
    """The emulator's settings."""
    queue = spec.queue_limit_bytes
    return {
        "rate": round(spec.rate_bit_per_s or 0),
        "delay": round(spec.round_trip_s * 1e6 / 2),
        "queue": _UNBOUNDED_BYTES if queue is None else queue,
        "loss": round(spec.loss * 1e6),
    }


def netem_words(spec: LinkSpec) -> list[str]:
    """The settings of a netem queue discipline. Its limit counts packets, those under way included."""
    words = ["delay", f"{round(spec.round_trip_s * 1e6 / 2)}us"]
    packets = _NETEM_MOST_PACKETS
    if spec.rate_bit_per_s is not None:
        under_way_bytes = spec.rate_bit_per_s * spec.round_trip_s / 2 / 8
        packets = round(((spec.queue_limit_bytes or 0) + under_way_bytes) / spec.mtu_bytes) + 1
        words += ["rate", f"{round(spec.rate_bit_per_s)}bit"]
    if spec.loss:
        words += ["loss", f"{spec.loss * 100:.6f}%"]
    return [*words, "limit", str(packets)]


def read_counters(line: str) -> Counters:
    """A line of the emulator: ``direction 0 packets 12 bytes 3456 full 0 lost 0 cut 0 overflow 0``."""
    words = line.split()
    values = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    del values["direction"]
    return Counters(**values)
