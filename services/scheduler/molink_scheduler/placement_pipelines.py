"""The pipelines that a pool makes up: one, or several side by side, and how many workers they leave over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from molink_scheduler import placement_large, placement_search
from molink_scheduler.placement_cut import cut
from molink_scheduler.placement_search import Found
from molink_scheduler.placement_sizes import Candidate, Roads, Sizes
from molink_scheduler.placement_values import LayerMap, PlacedStage, PlacementSettings

EXACT_UP_TO = 8
"""Workers whose subsets and orders are all searched; each one more costs two and a half times as much."""
_LINKS_MUST_GAIN = 1.05
"""By how much an order that heeds measured links must be faster than one that does not."""
_DIVIDING_MUST_GAIN = 1.05
"""By how much pipelines of parts of the pool must be faster than one and what it leaves over."""


class Planner:
    """The search over one pool. `by_speed` False: every fit worker is to hold a stage."""

    def __init__(self, sizes: Sizes, roads: Roads, settings: PlacementSettings, *, by_speed: bool) -> None:
        self._sizes = sizes
        self._roads = roads
        self._settings = settings
        self._by_speed = by_speed

    def pipelines(self, pool: Sequence[Candidate]) -> list[LayerMap]:
        """None, when the pool cannot hold the model; else up to `max_pipelines`."""
        best = self._one_after_another(pool)
        if not (best and self._by_speed):
            return best
        for count in range(2, self._settings.max_pipelines + 1):
            parts = [self._one(part, keeps=(0,)) for part in self._parts(pool, count)]
            found = [part for part in parts if part is not None]
            if len(found) < count:
                break
            if self._steps_per_s(found, pool) > _DIVIDING_MUST_GAIN * self._steps_per_s(best, pool):
                best = found
        return best

    def _one_after_another(self, pool: Sequence[Candidate]) -> list[LayerMap]:
        """Each of what those before leave over. The first may use workers that should be held back, if it must."""
        pipelines: list[LayerMap] = []
        rest = list(pool)
        hold_back = self._settings.hold_back
        while len(pipelines) < self._settings.max_pipelines:
            found = self._one(rest, keeps=(hold_back,) if pipelines else range(hold_back, -1, -1))
            if found is None:
                break
            pipelines.append(found)
            used = {stage.worker for stage in found.stages}
            rest = [one for one in rest if one.offer.worker not in used]
        return pipelines

    def _one(self, pool: Sequence[Candidate], *, keeps: Sequence[int]) -> LayerMap | None:
        """A pipeline that leaves over the first possible of these numbers of workers."""
        settings, num_layers = self._settings, self._sizes.num_layers
        least = max(1, settings.min_stages)
        for keep in keeps:
            most = min(len(pool) - keep, num_layers, settings.max_stages or num_layers)
            for stages in (least,) if self._by_speed else range(most, least - 1, -1):
                if stages > most:
                    continue
                found = self._find(pool, stages, most)
                if found is not None:
                    return self._layer_map(found)
        return None

    def _find(self, pool: Sequence[Candidate], least: int, most: int) -> Found | None:
        if len(pool) <= EXACT_UP_TO:
            return placement_search.find_order(self._sizes, self._roads, pool, least_stages=least, most_stages=most)
        found = placement_large.find_order(self._sizes, pool, least_stages=least, most_stages=most)
        return None if found is None else self._around_slow_links(found, pool, least, most)

    def _around_slow_links(self, found: Found, pool: Sequence[Candidate], least: int, most: int) -> Found:
        """The search of large pools does not weigh links: search its workers, and the fastest others, exactly."""
        order, _ = found
        slowest_s = self._slowest_s(found)
        if len(order) > EXACT_UP_TO or slowest_s > self._slowest_s(found, with_links=True) / _LINKS_MUST_GAIN:
            return found
        others = sorted((one for one in pool if one not in order), key=lambda one: one.pace.parameter_s)
        few = [*order, *others[: EXACT_UP_TO - len(order)]]
        exact = placement_search.find_order(
            self._sizes, self._roads, few, least_stages=least, most_stages=min(most, len(few))
        )
        assert exact is not None, "the order that was found does"
        is_better = _LINKS_MUST_GAIN * self._slowest_s(exact, with_links=True) < self._slowest_s(found, with_links=True)
        return exact if is_better else found

    def _slowest_s(self, found: Found, *, with_links: bool = False) -> float:
        order, allowed_s = found
        stages_s = self._sizes.slowest_s(order, cut(self._sizes, order, allowed_s))
        links_s = [self._roads.step_s(a.offer, b.offer) for a, b in pairwise(order)] if with_links else []
        return max([stages_s, *links_s])

    def _layer_map(self, found: Found) -> LayerMap:
        order, allowed_s = found
        sizes = self._sizes
        ends = cut(sizes, order, allowed_s)
        stages: list[PlacedStage] = []
        num_blocks = sizes.most_blocks
        for candidate, first, last in zip(order, [0, *ends[:-1]], ends, strict=True):
            weights, block_bytes = sizes.weight_bytes(first, last), sizes.block_bytes(first, last)
            if block_bytes:
                num_blocks = min(num_blocks, (candidate.room_bytes - weights) // block_bytes)
            stages.append(
                PlacedStage(worker=candidate.offer.worker, first_layer=first, last_layer=last, weight_bytes=weights)
            )
        return LayerMap(stages=tuple(stages), num_blocks=num_blocks)

    def _steps_per_s(self, pipelines: Sequence[LayerMap], pool: Sequence[Candidate]) -> float:
        by_worker = {one.offer.worker: one for one in pool}
        orders = [[by_worker[stage.worker] for stage in one.stages] for one in pipelines]
        ends = [[stage.last_layer for stage in one.stages] for one in pipelines]
        return sum(1 / self._sizes.slowest_s(order, last) for order, last in zip(orders, ends, strict=True))

    def _parts(self, pool: Sequence[Candidate], count: int) -> Iterator[list[Candidate]]:
        """Parts of about the same speed, of neighbours where that is possible, without those that are held back."""
        fastest = sorted(pool, key=lambda one: one.pace.parameter_s)
        kept = fastest[: max(0, len(pool) - self._settings.hold_back)]
        speed_of_site: dict[str, float] = defaultdict(float)
        for one in kept:
            speed_of_site[one.site] += 1 / one.pace.parameter_s
        kept.sort(key=lambda one: (-speed_of_site[one.site], one.site))
        total = sum(speed_of_site.values())
        part: list[Candidate] = []
        passed, parts = 0.0, 1
        for one in kept:
            part.append(one)
            passed += 1 / one.pace.parameter_s
            if parts < count and passed >= total * parts / count * 0.999:
                yield part
                part, parts = [], parts + 1
        if part:
            yield part
