"""The exact search for a small pool: all subsets of the workers in all orders.

Every step asks one question: how far do these workers reach when no stage may take longer than so many seconds?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from molink_scheduler.placement_sizes import Candidate, Roads, Sizes
from molink_scheduler.placement_times import NO_LIMIT_S, TOLERANCE, least_time

Found = tuple[list[Candidate], float]
"""The workers of a pipeline, head first, and the time of a stage that counts as no worse than the best."""

_Table = list[list[int]]
"""By subset and its last worker: the farthest layer reached; 0: none."""


def find_order(
    sizes: Sizes, roads: Roads, candidates: Sequence[Candidate], *, least_stages: int, most_stages: int
) -> Found | None:
    """The smallest bottleneck, within `TOLERANCE` the fewest slow crossings, then the fewest stages.

    None when no cut over that many stages fits. Of equal workers the earlier ones come first.
    """
    search = _Subsets(sizes, roads, candidates, least_stages, most_stages)
    if search.chain(NO_LIMIT_S) is None:
        return None
    longest_s = [sizes.stage_s(one.pace, 0, sizes.num_layers) for one in candidates]
    longest_s += [roads.step_s(a.offer, b.offer) for a in candidates for b in candidates]
    allowed_s = TOLERANCE * least_time(lambda most_s: search.chain(most_s) is not None, max(longest_s))
    crossings, best = next(
        (crossings, chain)
        for crossings in range(len(candidates))
        if (chain := search.chain(allowed_s, crossings)) is not None
    )
    search = _Subsets(sizes, roads, candidates, least_stages, len(best))
    within_s = least_time(lambda most_s: search.chain(most_s, crossings) is not None, allowed_s)
    chain = search.chain(within_s, crossings)
    assert chain is not None, "a time that was found to be enough is enough"
    return [candidates[index] for index in chain], allowed_s


class _Subsets:
    """How far each subset of the workers reaches, by its last worker and its crossings.

    A part of a stage that fits fits too. So to have come farther is never worse, and for each subset and last worker
    only the farthest end counts: O(2ⁿ n²) for n workers, times the number of crossings.
    """

    def __init__(
        self, sizes: Sizes, roads: Roads, candidates: Sequence[Candidate], least_stages: int, most_stages: int
    ) -> None:
        offers = [candidate.offer for candidate in candidates]
        self._most_stages = most_stages
        self._least_stages = least_stages
        self._sizes = sizes
        self._candidates = candidates
        self._crosses = [[roads.crosses(a, b) for b in offers] for a in offers]
        self._link_s = [[roads.step_s(a, b) for b in offers] for a in offers]
        self._members = [[w for w in range(len(offers)) if mask >> w & 1] for mask in range(1 << len(offers))]

    def chain(self, most_s: float, most_crossings: int | None = None) -> list[int] | None:
        """The workers, head first, of a pipeline within these bounds that has the fewest stages; None: any number."""
        sizes = self._sizes
        ends = [sizes.reaches(one, most_s, sizes.least_blocks) for one in self._candidates]
        tables: list[_Table] = []
        for _ in range(1 if most_crossings is None else most_crossings + 1):
            tables.append(self._table(ends, most_s, tables, is_free=most_crossings is None))
        complete = [
            (len(members), mask)
            for mask, members in enumerate(self._members)
            if max(tables[-1][mask]) == sizes.num_layers
        ]
        return self._trace(tables, min(complete)[1], most_s, is_free=most_crossings is None) if complete else None

    def _table(self, ends: list[list[int]], most_s: float, before: list[_Table], *, is_free: bool) -> _Table:
        """For one crossing more than `before` has tables for; `is_free`: crossings are not counted."""
        count = len(ends)
        num_layers = self._sizes.num_layers
        table: _Table = [[0] * count for _ in self._members]
        crossed = table if is_free else before[-1] if before else None
        for mask, members in enumerate(self._members):
            if not 0 < len(members) <= self._most_stages:
                continue
            most_layers = num_layers - max(0, self._least_stages - len(members))
            row = table[mask]
            for worker in members:
                first = 0
                if len(members) > 1:
                    first, _ = max(self._before(table, crossed, mask, worker, most_s), default=(0, 0))
                    if first in (0, num_layers):
                        continue
                last = min(ends[worker][first], most_layers)
                row[worker] = last if last > first else 0
        return table

    def _before(
        self, table: _Table, crossed: _Table | None, mask: int, worker: int, most_s: float
    ) -> Iterator[tuple[int, int]]:
        """How far the subset without the worker comes, by its last worker, when the worker is to follow."""
        rest = mask & ~(1 << worker)
        for last in self._members[rest]:
            if self._link_s[last][worker] <= most_s:
                source = crossed if self._crosses[last][worker] else table
                yield (source[rest][last] if source is not None else 0), last

    def _trace(self, tables: list[_Table], mask: int, most_s: float, *, is_free: bool) -> list[int]:
        """The way to the end of the model that the last table tells of; of equal workers the later ones come last."""
        level = len(tables) - 1
        _, worker = max((tables[level][mask][last], last) for last in self._members[mask])
        chain = [worker]
        while mask != 1 << worker:
            crossed = tables[level] if is_free else tables[level - 1] if level else None
            _, previous = max(self._before(tables[level], crossed, mask, worker, most_s))
            mask &= ~(1 << worker)
            level -= self._crosses[previous][worker] and not is_free
            worker = previous
            chain.append(worker)
        return chain[::-1]
