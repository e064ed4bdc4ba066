"""What a link of a laboratory really gives: the round trip of a datagram, and what one bulk TCP flow gets through."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.netlab.lab import Lab
from bench.netlab.registry import LabError
from bench.netlab.topology import LinkSpec

_END = Path(__file__).with_name("probe_end.py")
_TCP_AND_IP_HEADER_BYTES = 52
"""With TCP's time stamps, which Linux sends."""
_SPARE_S = 20.0
Seen = tuple[float, int]
"""When, by `time.perf_counter`, and how many bytes since the device is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """From one host to another."""

    round_trip_s: float | None
    """The median; None: no datagram came back."""
    least_round_trip_s: float | None
    unanswered: int
    goodput_bit_per_s: float
    """Payload of one TCP flow, its start included; 0 if none was asked for."""
    steady_goodput_bit_per_s: float
    """The same, past its start. What was held up behind a lost packet counts when it is released."""
    wire_bit_per_s: float
    """What came through the target's device meanwhile, headers and repeated packets included."""
    emulator_cores: float | None
    """Processor time of the link's emulator over time, meanwhile; None where there is no emulator."""


def expected_goodput_bit_per_s(spec: LinkSpec) -> float | None:
    """What a TCP flow can get at most, headers taken off; None for an unlimited link."""
    if spec.rate_bit_per_s is None:
        return None
    return spec.rate_bit_per_s * (1 - _TCP_AND_IP_HEADER_BYTES / spec.mtu_bytes)


async def measure(
    lab: Lab,
    source: str,
    target: str,
    *,
    seconds: float = 0.0,
    pings: int = 20,
    ping_timeout_s: float = 1.0,
    address: str | None = None,
) -> Measured:
    """Ping, then send in bulk for `seconds` (0: only ping). `address` None is the target's on the links.

    Raises:
        LabError: an end failed, or did not end in time.
    """
    words = ("ask", address or lab.link_address(target), str(pings), str(ping_timeout_s), str(seconds))
    serve = ("serve", lab.device(target, source), str(seconds))
    started_s, cpu_before_s = asyncio.get_running_loop().time(), _cpu_s(lab, source, target)
    try:
        async with asyncio.timeout(seconds + pings * ping_timeout_s + _SPARE_S), _end(lab, target, *serve) as server:
            assert server.stdout is not None
            await server.stdout.readline()
            async with _end(lab, source, *words) as client:
                said = await _last_word(client)
            flow = await _last_word(server) if seconds > 0 else {}
    except TimeoutError:
        raise LabError(f"the probe from {source} to {target} does not end") from None
    cpu_after_s = _cpu_s(lab, source, target)
    lasted_s = asyncio.get_running_loop().time() - started_s
    trips: list[float] = said["round_trips_s"]
    return Measured(
        round_trip_s=statistics.median(trips) if trips else None,
        least_round_trip_s=min(trips, default=None),
        unanswered=said["unanswered"],
        goodput_bit_per_s=flow.get("bit_per_s", 0.0),
        steady_goodput_bit_per_s=flow.get("steady_bit_per_s", 0.0),
        wire_bit_per_s=flow.get("wire_bit_per_s", 0.0),
        emulator_cores=(
            None if cpu_before_s is None or cpu_after_s is None else (cpu_after_s - cpu_before_s) / lasted_s
        ),
    )


@asynccontextmanager
async def watched(lab: Lab, source: str, target: str, *, every_s: float) -> AsyncIterator[AsyncIterator[Seen]]:
    """What has come through the target's device on its way to the source, headers included, as time goes by."""
    async with _end(lab, target, "watch", lab.device(target, source), str(every_s)) as watcher:

        async def seen() -> AsyncIterator[Seen]:
            assert watcher.stdout is not None
            while line := await watcher.stdout.readline():
                at_s, received = line.split()
                yield float(at_s), int(received)

        yield seen()


def _cpu_s(lab: Lab, source: str, target: str) -> float | None:
    is_one_link = frozenset((source, target)) in lab.topology.links
    return lab.emulator_cpu_s(source, target) if is_one_link else None


def _end(lab: Lab, host: str, *words: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    return lab.program(host, [sys.executable, "-I", "-S", str(_END), *words], stderr=asyncio.subprocess.PIPE)


async def _last_word(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None and process.stderr is not None
    line = await process.stdout.readline()
    if not line:
        raise LabError(f"the probe failed: {(await process.stderr.read()).decode(errors='replace')[-300:]}")
    await process.wait()
    body: dict[str, Any] = json.loads(line)
    return body


def describe(spec: LinkSpec | None) -> str:
    """A link in words: ``100 Mbit/s, 30 ms``."""
    if spec is None:
        return "LAN"
    rate = "unlimited" if spec.rate_bit_per_s is None else f"{spec.rate_bit_per_s / 1e6:g} Mbit/s"
    loss = f", {spec.loss:.2%} lost" if spec.loss else ""
    return f"{rate}, {spec.round_trip_s * 1e3:g} ms{loss}"


def show_ms(time_s: float | None) -> str:
    """A time for a person; None is no answer."""
    return "never" if time_s is None else f"{time_s * 1e3:.2f} ms"
