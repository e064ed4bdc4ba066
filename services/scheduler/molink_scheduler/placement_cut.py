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
    best = _even(sizes, order, allowed_s, sizes.least_blocks)
    if best is None:
        allowed_s = NO_LIMIT_S
        best = _even(sizes, order, allowed_s, sizes.least_blocks)
    if best is None:
        raise ValueError("no cut in this order fits")
    enough, too_many = sizes.least_blocks, sizes.most_blocks + 1
    while too_many - enough > max(1, enough // 32):
        # the first question is whether there is room for all that may be asked for
        middle = sizes.most_blocks if too_many > sizes.most_blocks else (enough + too_many) // 2
        found = _even(sizes, order, allowed_s, middle)
        if found is None:
            too_many = middle
        else:
            best, enough = found, middle
    return best


def _even(sizes: Sizes, order: Sequence[Candidate], most_s: float, num_blocks: int) -> list[int] | None:
    """Of the cuts within these bounds the shortest slowest stage, then the least sum of squares."""
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for index, candidate in enumerate(order):
        most_layers = sizes.num_layers - (len(order) - index - 1)
        is_tail = most_layers == sizes.num_layers
        reached: dict[int, tuple[float, float, list[int]]] = {}
        for first, (worst_s, squares, cuts) in best.items():
            end = min(sizes.reach(candidate, first, most_s, num_blocks), most_layers)
            for last in range(most_layers if is_tail else first + 1, end + 1):
                stage_s = sizes.stage_s(candidate.pace, first, last)
                found = (max(worst_s, stage_s), squares + stage_s * stage_s)
                if last not in reached or found < reached[last][:2]:
                    reached[last] = (*found, [*cuts, last])
        best = reached
    return best[sizes.num_layers][2] if best else None
