"""Does the laboratory of this machine do what it says? Measures its links and tries what can go wrong.

Rates within 5 %, round trips within 1 ms (the best of twenty datagrams: other work on the machine may delay any one),
links that can be changed, cut and mended, no way round the links, and nothing left behind, not even by a killed run.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from bench.netlab.lab import open_lab
from bench.netlab.probe import Measured, describe, measure, show_ms
from bench.netlab.registry import clean, namespaces_of
from bench.netlab.topology import LinkSpec, three_hosts, two_hosts

_RATE_TOLERANCE = 0.05
_ROUND_TRIP_TOLERANCE_S = 1e-3
_CLOCK_TOLERANCE_S = 5e-5
_START_TIMEOUT_S = 30.0
_SHAPES = (
    LinkSpec(rate_bit_per_s=10e6, round_trip_s=0.030),
    LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.030),
    # the queue keeps the link busy while cubic recovers from having filled it
    LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.100, queue_bytes=5_000_000),
    LinkSpec(rate_bit_per_s=1e9, round_trip_s=0.002),
)
_HOLDER = """
import asyncio
from bench.netlab.lab import open_lab
from bench.netlab.topology import LinkSpec, two_hosts

async def main():
    async with open_lab(two_hosts(LinkSpec(round_trip_s=0.01))) as lab:
        print(lab.number, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried."""

    what: str
    is_good: bool


async def selftest(say: Callable[[str], None], *, seconds: float) -> bool:
    """Try everything, with bulk flows of `seconds`, and say each result; whether all were good."""
    all_good = True
    for trial in (_shapes(seconds), _changes(seconds), _cuts(), _loss(), _ways(), _remains()):
        async with contextlib.aclosing(trial):
            async for check in trial:
                say(f"{'good' if check.is_good else 'BAD '}  {check.what}")
                all_good &= check.is_good
    return all_good


def as_shaped(spec: LinkSpec, found: Measured) -> list[Check]:
    """Whether a link is what its spec says."""
    name, wanted, trip_s = describe(spec), spec.rate_bit_per_s, found.least_round_trip_s
    late_s = None if trip_s is None else trip_s - spec.round_trip_s
    is_in_time = late_s is not None and -_CLOCK_TOLERANCE_S < late_s < _ROUND_TRIP_TOLERANCE_S
    checks = [Check(what=f"{name}: round trip {show_ms(trip_s)}", is_good=is_in_time)]
    if wanted is not None and found.wire_bit_per_s:
        cores = "" if found.emulator_cores is None else f"; emulating it took {found.emulator_cores:.2f} of a core"
        goodput = f"{found.steady_goodput_bit_per_s / 1e6:.2f} of them TCP's payload"
        what = f"{name}: carries {found.wire_bit_per_s / 1e6:.2f} Mbit/s, {goodput}{cores}"
        checks.append(Check(what=what, is_good=abs(found.wire_bit_per_s / wanted - 1) <= _RATE_TOLERANCE))
    return checks


async def _shapes(seconds: float) -> AsyncGenerator[Check, None]:
    for spec in _SHAPES:
        async with open_lab(two_hosts(spec)) as lab:
            for check in as_shaped(spec, await measure(lab, "a", "b", seconds=seconds)):
                yield check
            counters = await lab.counters("a", "b")
            if counters is not None:
                yield Check(what=f"{describe(spec)}: room for every packet", is_good=counters[0].overflow == 0)


async def _changes(seconds: float) -> AsyncGenerator[Check, None]:
    slow, fast = (LinkSpec(rate_bit_per_s=rate, round_trip_s=0.02) for rate in (20e6, 200e6))
    async with open_lab(two_hosts(slow)) as lab:
        yield Check(what="a link is changed while it runs:", is_good=True)
        for spec in (fast, slow):
            await lab.set_link("a", "b", spec)
            for check in as_shaped(spec, await measure(lab, "a", "b", seconds=seconds)):
                yield check
        await lab.set_link("a", "b", replace(slow, round_trip_s=0.06), one_way=True)
        found = await measure(lab, "b", "a")
        for check in as_shaped(replace(slow, round_trip_s=0.04), found):
            yield replace(check, what=f"one way only, {check.what}")


async def _cuts() -> AsyncGenerator[Check, None]:
    for spec in (LinkSpec(rate_bit_per_s=10e6, round_trip_s=0.01), None):
        name = describe(spec)
        async with open_lab(two_hosts(spec)) as lab:
            await lab.cut("a", "b")
            found = await measure(lab, "a", "b", pings=3, ping_timeout_s=0.2)
            yield Check(what=f"{name}: cut, nothing comes through", is_good=found.unanswered == 3)
            await lab.mend("a", "b")
            found = await measure(lab, "a", "b", pings=3)
            yield Check(what=f"{name}: mended, everything does", is_good=found.unanswered == 0)


async def _loss() -> AsyncGenerator[Check, None]:
    async with open_lab(two_hosts(LinkSpec(loss=0.1))) as lab:
        found = await measure(lab, "a", "b", pings=300, ping_timeout_s=0.02)
        # 19 % are lost on one way or the other: 57 of 300, with a standard deviation of 7
        what = f"10 % loss each way: {found.unanswered} of 300 round trips lost"
        yield Check(what=what, is_good=30 <= found.unanswered <= 90)


async def _ways() -> AsyncGenerator[Check, None]:
    spec = LinkSpec(round_trip_s=0.02)
    async with open_lab(two_hosts(spec)) as lab:
        found = await measure(lab, "b", "a", pings=2, ping_timeout_s=0.2, address=lab.address("a"))
        yield Check(what="hosts do not reach each other round the link", is_good=found.unanswered == 2)
    mesh = three_hosts(spec)
    chain = {pair: link for pair, link in mesh.links.items() if pair != frozenset("ac")}
    async with open_lab(replace(mesh, links=chain)) as lab:
        found = await measure(lab, "a", "c")
        (check,) = as_shaped(LinkSpec(round_trip_s=0.04), found)
        yield replace(check, what=f"over two links, {check.what}")


async def _remains() -> AsyncGenerator[Check, None]:
    for how in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        holder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _HOLDER),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert holder.stdout is not None
            async with asyncio.timeout(_START_TIMEOUT_S):
                number = int(await holder.stdout.readline())
                had, _ = len(namespaces_of(number)), clean()
                is_kept = had == 2 == len(namespaces_of(number))
                yield Check(what="cleaning leaves what a living run has", is_good=is_kept)
                holder.send_signal(how)
                await holder.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                holder.kill()
            await holder.wait()
        if how is signal.SIGKILL:
            clean()
        after = " and cleaning" if how is signal.SIGKILL else ""
        yield Check(what=f"after {how.name}{after} nothing is left", is_good=not namespaces_of(number))
