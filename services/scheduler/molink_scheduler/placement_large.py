"""The search for a large pool: a good order, not always the best one.

Layers are mostly alike, so that for a given time a worker is worth a number of layers, and the fewest stages are those
of the workers that are worth most. Only the ends differ: the head also holds the embedding, the tail also holds and
computes the output head; they go to workers that lose the fewest layers by it. As for small pools: the smallest
bottleneck, within `TOLERANCE` the fewest sites, each entered once, then the fewest stages. Measured links are not
weighed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from molink_scheduler.placement_sizes import Candidate, Sizes
from molink_scheduler.placement_times import NO_LIMIT_S, TOLERANCE, least_time

_ENDS_TRIED = 3
"""Workers tried as head, and as many as tail."""
_MORE_TRIED = 3
"""Stages tried beyond the fewest by worth: layers that are not all alike may need them."""
_SITES_TRIED = 8
"""Sites tried alone; and the number of sites beyond which fewer are not looked for."""


def find_order(
    sizes: Sizes, candidates: Sequence[Candidate], *, least_stages: int, most_stages: int
) -> tuple[list[Candidate], float] | None:
    """The workers of a pipeline, head first, and the time of a stage that counts as no worse than the best.

    None when none was found that fits.
    """
    search = _Greedy(sizes, least_stages, most_stages)
    if search.order(candidates, NO_LIMIT_S) is None:
        return None
    slowest_s = max(sizes.stage_s(one.pace, 0, sizes.num_layers) for one in candidates)
    least_s = least_time(lambda most_s: search.order(candidates, most_s) is not None, slowest_s)
    found = next(search.on_few_sites(candidates, least_s * TOLERANCE), None) or search.order(candidates, least_s)
    assert found is not None, "a time that was found to be enough is enough"
    return found, least_s * TOLERANCE


@dataclass(frozen=True, slots=True, eq=False)
class _Worth:
    """What a worker is worth within a time, in layers."""

    candidate: Candidate
    layers: int
    as_head: int
    as_tail: int


class _Greedy:
    def __init__(self, sizes: Sizes, least_stages: int, most_stages: int) -> None:
        self._sizes = sizes
        self._least_stages = least_stages
        self._most_stages = most_stages

    def order(self, pool: Sequence[Candidate], most_s: float) -> list[Candidate] | None:
        """Few workers of the pool, in an order in which they hold the model, no stage longer than `most_s`."""
        return self._order(self._worths(pool, most_s), most_s)

    def on_few_sites(self, pool: Sequence[Candidate], most_s: float) -> Iterator[list[Candidate]]:
        """As `order`, with each site entered once, those on fewer sites first."""
        sites: dict[str, list[_Worth]] = defaultdict(list)
        for worth in self._worths(pool, most_s):
            sites[worth.candidate.site].append(worth)
        total = {
            site: sum(sorted((worth.layers for worth in worths), reverse=True)[: self._most_stages])
            for site, worths in sites.items()
        }
        largest = sorted(total, key=lambda site: (-total[site], site))
        for site in largest[:_SITES_TRIED]:
            found = self._order(sites[site], most_s)
            if found is not None:
                yield found
        for count in range(2, min(len(largest), _SITES_TRIED) + 1):
            chosen = largest[:count]
            worths = [worth for site in chosen for worth in sites[site]]
            for first, last in permutations(chosen, 2):
                found = self._order(worths, most_s, first_site=first, last_site=last)
                if found is not None:
                    yield found

    def _worths(self, pool: Sequence[Candidate], most_s: float) -> list[_Worth]:
        """Those worth most first."""
        sizes = self._sizes
        worths = [
            _Worth(
                candidate,
                sizes.usual_reach(candidate, most_s),
                sizes.reach(candidate, 0, most_s, sizes.least_blocks),
                sizes.num_layers - sizes.reach_back(candidate, most_s, sizes.least_blocks),
            )
            for candidate in pool
        ]
        return sorted(worths, key=lambda worth: -worth.layers)

    def _order(
        self, worths: Sequence[_Worth], most_s: float, *, first_site: str | None = None, last_site: str | None = None
    ) -> list[Candidate] | None:
        if sum(max(worth.layers, worth.as_head, worth.as_tail) for worth in worths) < self._sizes.num_layers // 4:
            return None  # not by far: layers that are not alike do not explain it
        heads = [worth for worth in worths if worth.as_head and first_site in (None, worth.candidate.site)]
        tails = [worth for worth in worths if worth.as_tail and last_site in (None, worth.candidate.site)]
        heads = sorted(heads, key=lambda worth: worth.layers - worth.as_head)[:_ENDS_TRIED]
        tails = sorted(tails, key=lambda worth: worth.layers - worth.as_tail)[: _ENDS_TRIED + 1]
        for head in heads:
            if head.as_head == self._sizes.num_layers and self._least_stages == 1:
                return [head.candidate]
            for tail in tails:
                found = self._between(head, tail, worths, most_s) if tail is not head else None
                if found is not None:
                    return found
        return None

    def _between(self, head: _Worth, tail: _Worth, worths: Sequence[_Worth], most_s: float) -> list[Candidate] | None:
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
            found = self._walk([head.candidate, *chosen, tail.candidate], tail, most_s)
            if found is not None:
                return found
        return None

    def _walk(self, order: Sequence[Candidate], tail: _Worth, most_s: float) -> list[Candidate] | None:
        """The order without those that are not needed, every one as full as may be."""
        sizes = self._sizes
        used: list[Candidate] = []
        reached = 0
        for candidate in order:
            stages = len(used) + 1
            if reached >= sizes.num_layers - tail.as_tail and stages >= self._least_stages:
                return [*used, tail.candidate]
            most_layers = sizes.num_layers - max(1, self._least_stages - stages)
            last = min(sizes.reach(candidate, reached, most_s, sizes.least_blocks), most_layers)
            if last > reached and candidate is not tail.candidate:
                used.append(candidate)
                reached = last
        return None
