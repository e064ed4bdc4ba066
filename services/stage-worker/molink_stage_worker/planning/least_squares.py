"""Non-negative least squares that forgets, for a handful of features."""

from __future__ import annotations

from operator import mul

_MOST_SWEEPS = 25
_SETTLED = 1e-6
"""A sweep that moves no coefficient by more than this share of the largest is the last one."""
_NEVER_ZERO = 1e-12


class ForgettingLeastSquares:
    """Exponentially weighted least squares with coefficients that are never negative.

    The normal equations are kept and solved when asked: the same answer as recursive least squares (Haykin,
    *Adaptive Filter Theory*, chapter on RLS), without its covariance, which grows without bound while nothing
    excites a direction. `ridge` pulls each coefficient towards 0 by that share of what the data say about it, so
    that of two features that move together the one with the smaller ridge gets the credit.
    """

    def __init__(self, *, scales: tuple[float, ...], ridge: tuple[float, ...], memory: float) -> None:
        self._scales = scales
        self._ridge = ridge
        self._memory = memory
        size = len(scales)
        self._products = [[0.0] * size for _ in range(size)]
        self._targets = [0.0] * size
        self._solution = [0.0] * size

    def add(self, features: tuple[float, ...], target: float, weight: float) -> None:
        """Take one observation in and let all earlier ones fade by one step."""
        scaled = [value / scale for value, scale in zip(features, self._scales, strict=True)]
        for row, left in zip(self._products, scaled, strict=True):
            for column, right in enumerate(scaled):
                row[column] = self._memory * row[column] + weight * left * right
        for index, value in enumerate(scaled):
            self._targets[index] = self._memory * self._targets[index] + weight * value * target

    def solve(self) -> tuple[float, ...]:
        """The coefficients. Coordinate descent from the last solution: each sweep can only improve the fit."""
        solution = self._solution
        for _ in range(_MOST_SWEEPS):
            moved = 0.0
            for index, row in enumerate(self._products):
                before = solution[index]
                own = row[index] * (1.0 + self._ridge[index])
                if own <= _NEVER_ZERO:
                    solution[index] = 0.0
                    continue
                rest = sum(map(mul, row, solution)) - row[index] * before
                solution[index] = max((self._targets[index] - rest) / own, 0.0)
                moved = max(moved, abs(solution[index] - before))
            if moved <= _SETTLED * max(solution):
                break
        return tuple(value / scale for value, scale in zip(solution, self._scales, strict=True))
