"""How the least time is searched for that is enough, and the most of something else that fits in."""

from __future__ import annotations

import math
from collections.abc import Callable

TOLERANCE = 1.025
"""A bottleneck that is longer by no more than this factor counts as equal."""
NO_LIMIT_S = math.inf
_EXACT = 1.001
_LEAST_S = 1e-12


def least_time(is_enough: Callable[[float], bool], enough_s: float) -> float:
    """The least time that is enough, to a thousandth; `enough_s` is, and so is whatever is longer."""
    short_s = enough_s / 2
    while short_s > _LEAST_S and is_enough(short_s):
        enough_s, short_s = short_s, short_s / 2
    while enough_s > short_s * _EXACT:
        middle_s = math.sqrt(short_s * enough_s)
        if is_enough(middle_s):
            enough_s = middle_s
        else:
            short_s = middle_s
    return enough_s


def most_of(is_possible: Callable[[int], bool], least: int, most: int) -> int:
    """The most that is possible, to a factor of two; `least` is, and so is whatever is less."""
    while most > least and not is_possible(most):
        most = max(least, most // 2)
    return most
