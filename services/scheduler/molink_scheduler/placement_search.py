"""The exact search for a small pool: all subsets of the workers in all orders.

Every step asks one question: where can these workers' layers end when no stage may take longer than so many seconds?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from molink_scheduler.placement_sizes import Candidate, Roads, Sizes
from molink_scheduler.placement_times import NO_LIMIT_S, TOLERANCE, least_time, most_of

Found = tuple[list[Candidate], float]
"""The workers of a pipeline, head first, and the time of a stage that counts as no worse than the best."""

_Ends = int
"""A set of layers at which a pipeline's stages so far may end: bit n for ``[0, n)``."""
_Table = list[list[_Ends]]
"""By subset and its last worker."""


def find_order(
    sizes: Sizes, roads: Roads, candidates: Sequence[Candidate], *, least_stages: int, most_stages: int
) -> Found | None:
    """The smallest bottleneck; within `TOLERANCE` the fewest slow crossings, ample KV room, the fewest stages.

    In this order. None when no cut over that many stages fits. Of equal workers the earlier ones come first.
    """
    search = _Subsets(sizes, roads, candidates, least_stages, most_stages)
    if search.chain(NO_LIMIT_S) is None:
        return None
    longest_s = [sizes.stage_s(one.pace, 0, sizes.num_layers) for one in candidates]
    longest_s += [roads.step_s(a.offer, b.offer) for a in candidates for b in candidates]
    allowed_s = TOLERANCE * least_time(lambda most_s: search.chain(most_s) is not None, max(longest_s))
    crossings = next(c for c in range(len(candidates)) if search.chain(allowed_s, c) is not None)
    blocks = most_of(
        lambda blocks: search.chain(allowed_s, crossings, blocks) is not None, sizes.least_blocks, sizes.ample_blocks
    )
    fewest = search.chain(allowed_s, crossings, blocks)
    assert fewest is not None, "so many crossings and blocks were found to do"
    search = _Subsets(sizes, roads, candidates, least_stages, len(fewest))
    within_s = least_time(lambda most_s: search.chain(most_s, crossings, blocks) is not None, allowed_s)
    chain = search.chain(within_s, crossings, blocks)
    assert chain is not None, "a time that was found to be enough is enough"
    return [candidates[index] for index in chain], allowed_s


class _Subsets:
    """Where the layers of each subset of the workers can end, by its last worker and its crossings.

    Every worker of a subset holds a layer at least, also one that is there only because it has good links to its
    neighbours. O(2ⁿ n²) for n workers, times the number of crossings.
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

    def chain(
        self, most_s: float, most_crossings: int | None = None, num_blocks: int | None = None
    ) -> list[int] | None:
        """The workers, head first, of a pipeline within these bounds that has the fewest stages.

        `most_crossings` None: any number; `num_blocks` None: the least.
        """
        sizes = self._sizes
        reaches = [sizes.reaches(one, most_s, num_blocks or sizes.least_blocks) for one in self._candidates]
        tables: list[_Table] = []
        for _ in range(1 if most_crossings is None else most_crossings + 1):
            tables.append(self._table(reaches, most_s, tables, is_free=most_crossings is None))
        complete = [
            (len(members), mask)
            for mask, members in enumerate(self._members)
            if len(members) >= self._least_stages and max(tables[-1][mask]) >> sizes.num_layers
        ]
        if not complete:
            return None
        return self._trace(tables, reaches, min(complete)[1], most_s, is_free=most_crossings is None)

    def _table(self, reaches: list[list[int]], most_s: float, before: list[_Table], *, is_free: bool) -> _Table:
        """For one crossing more than `before` has tables for; `is_free`: crossings are not counted."""
        inside = (1 << self._sizes.num_layers) - 1
        table: _Table = [[0] * len(reaches) for _ in self._members]
        crossed = table if is_free else before[-1] if before else None
        stuck = [sum(1 << first for first, end in enumerate(reach) if end == first) for reach in reaches]
        for mask, members in enumerate(self._members):
            if not 0 < len(members) <= self._most_stages:
                continue
            for worker in members:
                firsts = 1 if len(members) == 1 else 0
                for _, ends in self._before(table, crossed, mask, worker, most_s):
                    firsts |= ends
                table[mask][worker] = _further(firsts & inside & ~stuck[worker], reaches[worker])
        return table

    def _before(
        self, table: _Table, crossed: _Table | None, mask: int, worker: int, most_s: float
    ) -> Iterator[tuple[int, _Ends]]:
        """The workers that this worker can follow when it comes last, and where the layers before it can end."""
        rest = mask & ~(1 << worker)
        for last in self._members[rest]:
            if self._link_s[last][worker] <= most_s:
                source = crossed if self._crosses[last][worker] else table
                if source is not None:
                    yield last, source[rest][last]

    def _trace(
        self, tables: list[_Table], reaches: list[list[int]], mask: int, most_s: float, *, is_free: bool
    ) -> list[int]:
        """The way to the end of the model that the last table tells of; of equal workers the later ones come last."""
        end = self._sizes.num_layers
        level = len(tables) - 1
        worker = max(last for last in self._members[mask] if tables[level][mask][last] >> end)
        chain = [worker]
        while mask != 1 << worker:
            crossed = tables[level] if is_free else tables[level - 1] if level else None
            previous, end = max(
                (last, first)
                for last, ends in self._before(tables[level], crossed, mask, worker, most_s)
                for first in range(end)
                if ends >> first & 1 and reaches[worker][first] >= end
            )
            mask &= ~(1 << worker)
            level -= self._crosses[previous][worker] and not is_free
            worker = previous
            chain.append(worker)
        return chain[::-1]


def _further(firsts: _Ends, reach: Sequence[int]) -> _Ends:
    """Where a stage can end that begins at one of these layers, each of which it has room for.

    From a run of neighbouring layers every layer is reached up to where the last of them reaches.
    """
    ends = 0
    while firsts:
        lowest = firsts & -firsts
        carried = firsts + lowest
        run = firsts & ~carried
        ends |= (1 << (reach[run.bit_length() - 1] + 1)) - 2 * lowest
        firsts &= carried
    return ends
