"""Stages and links of the planner's simulated pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Cost = Callable[[int], float]
"""Seconds of a step of so many tokens."""


def affine(fixed_s: float = 0.008, per_token_s: float = 0.0016) -> Cost:
    """A CPU."""
    return lambda tokens: fixed_s + per_token_s * tokens


def roofline(least_s: float = 0.0175, per_token_s: float = 0.000875) -> Cost:
    """A GPU: reading the weights, or computing."""
    return lambda tokens: max(least_s, per_token_s * tokens)


def stairs(fixed_s: float = 0.02, step_s: float = 0.012, width: int = 16) -> Cost:
    """A CPU that computes tiles."""
    return lambda tokens: fixed_s + step_s * math.ceil(tokens / width)


@dataclass(frozen=True, slots=True)
class Wire:
    rate_bytes_per_s: float
    round_trip_s: float


LAN = Wire(125e6, 0.0004)
GBIT_2 = Wire(125e6, 0.002)
WAN_30 = Wire(12.5e6, 0.03)
WAN_100 = Wire(12.5e6, 0.1)
SLOW_30 = Wire(1.25e6, 0.03)
