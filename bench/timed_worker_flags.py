"""The cost curve of a timed stage as flags, there and back. Pure: it imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from bench.cost_curve import CostCurve


def parse_curve(arguments: Sequence[str]) -> tuple[CostCurve, list[str]]:
    """The curve that the flags ask for, and the flags that are the worker's own."""
    parser = argparse.ArgumentParser(prog="python -m bench.timed_worker", allow_abbrev=False, add_help=False)
    for part in fields(CostCurve):
        parser.add_argument(_flag(part.name), type=float, dest=part.name)
    chosen, rest = parser.parse_known_args(arguments)
    given = {name: value / 1e6 for name, value in vars(chosen).items() if value is not None}
    return CostCurve(**given), rest


def curve_flags(curve: CostCurve) -> list[str]:
    """What `parse_curve` makes `curve` of."""
    return [word for part in fields(CostCurve) for word in (_flag(part.name), repr(getattr(curve, part.name) * 1e6))]


def _flag(part: str) -> str:
    """``layer_read_s`` → ``--layer-read-us``."""
    return f"--{part.removesuffix('_s').replace('_', '-')}-us"
