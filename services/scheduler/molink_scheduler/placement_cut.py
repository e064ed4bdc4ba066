"""Where the layers are cut over workers whose order is given."""

from __future__ import annotations

from collections.abc import Sequence

from molink_scheduler.placement_sizes import Candidate, Sizes
from molink_scheduler.placement_times import NO_LIMIT_S


def cut(sizes: Sizes, order: Sequence[Candidate], allowed_s: float) -> list[int]:
    """Where each stage ends: with as much KV room as stages of `allowed_s` leave, then as even as may be.

    Raises:
        ValueError: no cut in this order fits.
    """
    ends = _even(sizes, order, sizes.most_blocks)
    if ends is not None and sizes.slowest_s(order, ends) <= allowed_s:
        return ends
    fastest = _even(sizes, order, sizes.least_blocks)
    if fastest is None:
        raise ValueError("no cut in this order fits")
    allowed_s = max(allowed_s, sizes.slowest_s(order, fastest))
    enough, too_many = sizes.least_blocks, sizes.most_blocks + 1
    while too_many - enough > max(1, enough // 64):
        middle = (enough + too_many) // 2
        if _is_within(sizes, order, allowed_s, middle):
            enough = middle
        else:
            too_many = middle
    roomy = _even(sizes, order, enough)
    return fastest if roomy is None else roomy


def _is_within(sizes: Sizes, order: Sequence[Candidate], most_s: float, num_blocks: int) -> bool:
    """Whether stages as long as may be reach the end, each worker with one layer at least."""
    reached = 0
    for index, candidate in enumerate(order):
        left = len(order) - index - 1
        last = min(sizes.reach(candidate, reached, most_s, num_blocks), sizes.num_layers - left)
        if last == reached:
            return False
        reached = last
    return reached == sizes.num_layers


def _even(sizes: Sizes, order: Sequence[Candidate], num_blocks: int) -> list[int] | None:
    """The shortest slowest stage, then the least sum of squares. O(stages × layers²)."""
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for index, candidate in enumerate(order):
        left = len(order) - index - 1
        ends = range(index + 1, sizes.num_layers - left + 1) if left else (sizes.num_layers,)
        reached: dict[int, tuple[float, float, list[int]]] = {}
        for last in ends:
            for first, (worst_s, squares, cuts) in best.items():
                if first >= last or not sizes.fits(candidate, first, last, NO_LIMIT_S, num_blocks):
                    continue
                stage_s = sizes.stage_s(candidate.pace, first, last)
                found = (max(worst_s, stage_s), squares + stage_s * stage_s)
                if last not in reached or found < reached[last][:2]:
                    reached[last] = (*found, [*cuts, last])
        best = reached
    return best[sizes.num_layers][2] if sizes.num_layers in best else None
