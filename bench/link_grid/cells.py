"""What there is to measure: a grid of cells. Values only.

A `Setup` is a system that is started once; its cells (concurrency × workload) are measured one after the other on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from typing import Any

from bench.cost_curve import CostCurve
from bench.netlab.topology import LinkSpec, Topology, three_hosts, two_hosts
from bench.timed_worker_flags import curve_flags

LAN = "lan"
_LINK = re.compile(r"(\d+)(m|g)(\d+)")
_POLICY = re.compile(r"(adaptive|plain|published)(?::(\d+))?(?:\+(raw|lossless|int8))?(\+lookup)?")
MAX_RUNNING = 160
"""At the head: every stream and every newcomer, so that nobody waits for a place."""


class EngineKind(StrEnum):
    """What computes."""

    REAL = "real"
    """SmolLM2, where the processor is the limit."""
    SYNTHETIC = "synthetic"
    """A timed 70B, where the link is the limit."""


class Workload(StrEnum):
    """What the clients ask for."""

    DECODE = "decode"
    """Request after request of 32 tokens in and 64 out, in each stream."""
    MIXED = "mixed"
    """The same, and every five seconds a prompt of 1,500 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A system to start."""

    engine: EngineKind
    stages: int
    link: str
    """``lan``, or rate and round trip: ``1g2`` is 1 Gbit/s and 2 ms, ``100m30`` is 100 Mbit/s and 30 ms."""
    policy: str
    """``adaptive``, ``plain``, ``published``; ``adaptive:4`` for a fixed number of micro-batches, ``adaptive+int8`` for
    a codec on the links (auto gives the baselines none), ``adaptive+lookup`` with speculation."""

    def __post_init__(self) -> None:
        if self.stages not in (2, 3):
            raise ValueError(f"{self.stages} stages; there are topologies for 2 and 3")
        if _POLICY.fullmatch(self.policy) is None:
            raise ValueError(
                f"policy {self.policy!r}; it is adaptive, plain or published, adaptive:4, adaptive+int8 or "
                "adaptive+lookup"
            )
        link_of(self.link)

    @property
    def topology(self) -> Topology:
        """Hosts and links."""
        return {2: two_hosts, 3: three_hosts}[self.stages](link_of(self.link))

    @property
    def scheduler_flags(self) -> list[str]:
        """Of the scheduling policy and what the engine needs."""
        found = _POLICY.fullmatch(self.policy)
        assert found is not None, "checked at birth"
        flags = ["--scheduling", found[1], "--micro-batches", found[2] or "auto"]
        flags += ["--link-codec", found[3] or "auto", "--speculation", "lookup" if found[4] else "off"]
        flags += ["--ttft-target-s", "0"]  # the load is what the cell says, whatever the first tokens wait
        return flags + (["--dtype", "bfloat16"] if self.engine is EngineKind.SYNTHETIC else [])

    def worker_flags(self, curve: CostCurve) -> list[str]:
        """Alike for every policy."""
        flags = ["--max-running", str(MAX_RUNNING)]
        if self.engine is EngineKind.SYNTHETIC:
            flags += ["--memory", "100GiB", "--step-tokens", "1024", *curve_flags(curve)]
        return flags

    @property
    def worker_module(self) -> str:
        """What runs as a stage worker."""
        return "bench.timed_worker" if self.engine is EngineKind.SYNTHETIC else "molink_stage_worker"

    def __str__(self) -> str:
        return f"{self.engine} {self.stages} stages {self.link} {self.policy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A load on a system."""

    setup: Setup
    concurrency: int
    workload: Workload
    turn: int = 1
    """Which time it is measured."""

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= 128:
            raise ValueError(f"{self.concurrency} streams; from 1 to 128")

    @property
    def key(self) -> dict[str, Any]:
        """What a result is found by again."""
        return {
            **asdict(self.setup),
            "concurrency": self.concurrency,
            "workload": self.workload,
            "turn": self.turn,
        }

    def __str__(self) -> str:
        return f"{self.setup} {self.concurrency} concurrent {self.workload}, turn {self.turn}"


def link_of(name: str) -> LinkSpec | None:
    """The link of a name; None is a LAN.

    Raises:
        ValueError: it is no such name.
    """
    if name == LAN:
        return None
    found = _LINK.fullmatch(name)
    if found is None:
        raise ValueError(f"link {name!r}; it is lan, or rate and round trip in ms, as 100m30 or 1g2")
    unit = {"m": 1e6, "g": 1e9}[found[2]]
    return LinkSpec(rate_bit_per_s=int(found[1]) * unit, round_trip_s=int(found[3]) / 1e3)


def grid(
    *,
    engines: Sequence[EngineKind],
    stages: Sequence[int],
    links: Sequence[str],
    policies: Sequence[str],
    concurrency: Sequence[int],
    workloads: Sequence[Workload],
    turns: int = 1,
) -> Iterator[Cell]:
    """Every cell, `turns` times; those of one setup one after the other, policies of a link by turns.

    Raises:
        ValueError: a name is not known, or no turns.
    """
    if turns < 1:
        raise ValueError(f"{turns} turns; at least one")
    for engine, count, link, turn, policy in product(engines, stages, links, range(1, turns + 1), policies):
        setup = Setup(engine=engine, stages=count, link=link, policy=policy)
        for workload, streams in product(workloads, concurrency):
            if not _is_pointless(policy, streams):
                yield Cell(setup=setup, concurrency=streams, workload=workload, turn=turn)


def _is_pointless(policy: str, streams: int) -> bool:
    """More micro-batches than streams are as many micro-batches as streams."""
    _, _, count = policy.partition(":")
    return bool(count) and int(count) > streams
