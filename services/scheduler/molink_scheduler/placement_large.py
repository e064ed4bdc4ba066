"""The search for a large pool: a good order, not always the best one.

Layers are mostly alike, so that for a given time a worker is worth a number of layers, and the fewest stages are those
of the workers that are worth most. Only the ends differ: the head also holds the embedding, the tail also holds and
computes the output head; they go to workers that lose the fewest layers by it. As for small pools: the smallest
bottleneck; within `TOLERANCE` the fewest sites, each entered once, then ample KV room, then the fewest stages.
Measured links are not weighed; see `placement_pipelines` for what is done about slow ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from molink_scheduler.placement_sizes import Candidate, Sizes
from molink_scheduler.placement_times import NO_LIMIT_S, TOLERANCE, least_time, most_of

_ENDS_TRIED = 3
"""Workers tried as head, and as many as tail."""
_MORE_TRIED = 3
"""Stages tried beyond the fewest by worth: layers that are not all alike may need them."""
_ALIKE_FROM = 16
"""In a pool of more workers than this, what their usual worth is far too little for is not tried."""
_SITES_TRIED = 8
"""Sites tried alone; and the number of sites beyond which fewer are not looked for."""


def find_order(
    sizes: Sizes, candidates: Sequence[Candidate], *, least_stages: int, most_stages: int
) -> tuple[list[Candidate], float] | None:
    """The workers of a pipeline, head first, and the time of a stage that counts as no worse than the best.

    None when none was found that fits.
    """
    search = _Greedy(sizes, candidates, least_stages, most_stages)
    least = sizes.least_blocks
    if search.order(NO_LIMIT_S, least) is None:
        return None
    slowest_s = max(sizes.stage_s(one.pace, 0, sizes.num_layers) for one in candidates)
    least_s = least_time(lambda most_s: search.order(most_s, least) is not None, slowest_s)
    allowed_s = least_s * TOLERANCE
    few = next((sites for sites in search.site_sets(allowed_s) if search.order(allowed_s, least, sites)), None)
    if few is None:
        allowed_s = least_s  # where the search is not monotone: a time that was found to be enough
    blocks = most_of(lambda blocks: search.order(allowed_s, blocks, few) is not None, least, sizes.ample_blocks)
    found = search.order(allowed_s, blocks, few)
    assert found is not None, "so few sites, or so long a time, were found to do"
    return found, least_s * TOLERANCE


@dataclass(frozen=True, slots=True, eq=False)
class _Worth:
    """What a worker is worth within a time, in layers."""

    candidate: Candidate
    layers: int
    as_head: int
    as_tail: int


class _Greedy:
    def __init__(self, sizes: Sizes, pool: Sequence[Candidate], least_stages: int, most_stages: int) -> None:
        self._sizes = sizes
        self._pool = pool
        self._least_stages = least_stages
        self._most_stages = most_stages

    def site_sets(self, most_s: float) -> Iterator[tuple[str, ...]]:
        """Sites that may do alone, then the two that are worth most, and so on."""
        layers: dict[str, list[int]] = defaultdict(list)
        for one in self._pool:
            layers[one.site].append(self._sizes.usual_reach(one, most_s, self._sizes.least_blocks))
        worth = {site: sum(sorted(each, reverse=True)[: self._most_stages]) for site, each in layers.items()}
        largest = sorted(worth, key=lambda site: (-worth[site], site))[:_SITES_TRIED]
        yield from ((site,) for site in largest)
        yield from (tuple(largest[:count]) for count in range(2, len(largest) + 1))

    def order(self, most_s: float, num_blocks: int, sites: Sequence[str] | None = None) -> list[Candidate] | None:
        """Few workers, in an order in which they hold the model; of these sites only, each of them entered once."""
        sizes = self._sizes
        pool = [one for one in self._pool if sites is None or one.site in sites]
        usual = [sizes.usual_reach(one, most_s, num_blocks) for one in pool]
        if sum(usual) < sizes.num_layers // 4 and len(pool) > _ALIKE_FROM:
            return None  # not by far: layers that are not alike do not explain it
        worths = [
            _Worth(
                one,
                layers,
                sizes.reach(one, 0, most_s, num_blocks),
                sizes.num_layers - sizes.reach_back(one, most_s, num_blocks),
            )
            for one, layers in zip(pool, usual, strict=True)
        ]
        worths.sort(key=lambda worth: -worth.layers)
        for first, last in permutations(sites, 2) if sites is not None and len(sites) > 1 else ((None, None),):
            heads = [worth for worth in worths if worth.as_head and first in (None, worth.candidate.site)]
            tails = [worth for worth in worths if worth.as_tail and last in (None, worth.candidate.site)]
            found = self._with_ends(heads, tails, worths, most_s, num_blocks)
            if found is not None:
                return found
        return None

    def _with_ends(
        self,
        heads: Sequence[_Worth],
        tails: Sequence[_Worth],
        worths: Sequence[_Worth],
        most_s: float,
        num_blocks: int,
    ) -> list[Candidate] | None:
        heads = sorted(heads, key=lambda worth: worth.layers - worth.as_head)[:_ENDS_TRIED]
        # one more, since the best tail may be the head
        tails = sorted(tails, key=lambda worth: worth.layers - worth.as_tail)[: _ENDS_TRIED + 1]
        for head in heads:
            if head.as_head == self._sizes.num_layers and self._least_stages == 1:
                return [head.candidate]
            for tail in tails:
                found = self._between(head, tail, worths, most_s, num_blocks) if tail is not head else None
                if found is not None:
                    return found
        return None

    def _between(
        self, head: _Worth, tail: _Worth, worths: Sequence[_Worth], most_s: float, num_blocks: int
    ) -> list[Candidate] | None:
        middle = [worth for worth in worths if worth is not head and worth is not tail]
        most = min(len(middle), self._most_stages - 2)
        missing = self._sizes.num_layers - head.as_head - tail.as_tail
        fewest = 0
        while fewest < most and (missing > 0 or fewest + 2 < self._least_stages):
            missing -= middle[fewest].layers
            fewest += 1
        ends = (head.candidate.site, tail.candidate.site)
        for count in sorted({*range(fewest, min(fewest + _MORE_TRIED, most) + 1), most} if most >= 0 else ()):
            chosen = [worth.candidate for worth in middle[:count]]
            # sites keep together, those of the ends at the ends
            chosen.sort(key=lambda one: (one.site == ends[1], one.site != ends[0], one.site))
            found = self._walk([head.candidate, *chosen, tail.candidate], tail, most_s, num_blocks)
            if found is not None:
                return found
        return None

    def _walk(self, order: Sequence[Candidate], tail: _Worth, most_s: float, num_blocks: int) -> list[Candidate] | None:
        """The order without those that are not needed, every one as full as may be."""
        sizes = self._sizes
        used: list[Candidate] = []
        reached = 0
        for candidate in order:
            stages = len(used) + 1
            if reached >= sizes.num_layers - tail.as_tail and stages >= self._least_stages:
                return [*used, tail.candidate]
            most_layers = sizes.num_layers - max(1, self._least_stages - stages)
            last = min(sizes.reach(candidate, reached, most_s, num_blocks), most_layers)
            if last > reached and candidate is not tail.candidate:
                used.append(candidate)
                reached = last
        return None
