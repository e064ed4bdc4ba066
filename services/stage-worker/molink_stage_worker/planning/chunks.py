"""How prompts are cut: how large a chunk, what rides with decode steps, how many steps of their own are under way."""

from __future__ import annotations

from math import ceil

from molink_stage_worker.planning.cycle import Cycle, Machine
from molink_stage_worker.planning.stage_cost import StageCurve
from molink_stage_worker.planning.step_load import StepLoad, pays_together

LEAST_CHUNK = 16
_ALONG_SIZES = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256)
MOST_CHUNKS_UNDER_WAY = 32
_UNKNOWN_LINK_BYTES = 256 * 1024
"""On a link that nobody knows yet: no more at once."""
_STALL_SHARE = 0.25
"""Of the cycle: what one chunk may take of a stage."""
_STALL_STEPS = 1.25
"""What a chunk may always take, in steps of one token: less than a small step costs cannot be had."""
_WASTE = 1.6
"""Over the best cost a token: what small chunks may cost while others decode."""
_WASTE_ALONE = 1.1
_MOST_STALL_SHARE = 0.4
_BELIEVED_BEYOND = 2.0
"""Costs are believed for sizes up to so many times the largest that was measured."""
_LEAST_FREE_SHARE = 0.1
_ALONG_DELAY = 0.2
"""Of a decode step's time: what a chunk that rides along may add."""
_RIDING_DELAY = 0.75
"""Of a decode step's time: what short prompts in it may add."""
_RIDING_BUSY = 0.3
"""The share of its time that the busiest stage computes, from which on short prompts ride."""
_RIDING_PRICE = 0.85
"""Of what a token costs in a step of its own: what one that rides may cost."""
_RIDING_FREE = 0.1
"""Of the same: what counts as nothing."""
RIDING_LEAST = 8
"""Tokens: so many ride whatever they cost, unless the link would notice. A prompt in smaller parts takes too long."""
_RIDING_SIZES = (8, 10, *range(12, 64, 4))
"""Finer than those that go along: here a knee of the curve is to be met."""
_RIDING_SPAN = 16
"""Tokens: between closer sizes a measured curve's slope is mostly noise."""
_RIDING_LINK_SHARE = 0.05
"""Of a cycle: what short prompts in a step may take of a link."""
_RIDING_LEAST_LINK_S = 0.005
"""What they may always take."""
_RIDING_UNKNOWN_BYTES = 64 * 1024
"""In a step, where no link's rate is known."""


def starting_chunk_tokens(*, step_tokens: int, token_bytes: int) -> int:
    """How many tokens a chunk has before the link is known."""
    return min(max(_UNKNOWN_LINK_BYTES // token_bytes, LEAST_CHUNK), step_tokens)


def separate_chunk_tokens(
    machine: Machine,
    *,
    step_tokens: int,
    context_tokens: int,
    cycle_s: float | None,
    crowd: float,
    crowd_tokens: int,
    queue: float,
    latency_target_s: float | None,
) -> int:
    """Prompt tokens of a step of their own. `cycle_s` None: nothing decodes.

    `crowd` is how many prompts wait for each sequence that decodes, `crowd_tokens` how many tokens of them. Where many
    wait for few, as after a fault, the few give way: a chunk may take a stage that many cycles. But it shall be no
    larger than gets the crowd through all stages soonest, since the second stage stands still until the first is done
    with it. `queue` is how many prompts, in lengths of the longest, wait to be computed. Where more than one does,
    prompts come faster than such chunks compute them, and would wait longer and longer: shares of the cycle are so many
    times as large, up to all of it.

    Two wishes pull apart. A decode step that finds a chunk in a stage waits for its end: so a chunk should take no
    stage more than a quarter of a cycle. And every chunk pays a step's fixed cost: so a token should not cost more
    than 1.6 times what it costs in the best chunk. Where both cannot be had, the second wins, up to 40 % of a
    cycle: throughput lost to small chunks delays decode too, only less visibly. With nothing to delay, only the
    second counts, and stricter.
    """
    known_tokens = min(curve.tokens[-1] for curve in machine.stages)
    sizes = [size for size in grid(step_tokens) if size <= _BELIEVED_BEYOND * known_tokens] or grid(step_tokens)[:1]
    costs_s = [max(curve.compute_s(size, 1, context_tokens) for curve in machine.stages) for size in sizes]
    best_s = min(cost_s / size for cost_s, size in zip(costs_s, sizes, strict=True))
    waste = _WASTE_ALONE if cycle_s is None else _WASTE
    efficient = next(size for size, cost_s in zip(sizes, costs_s, strict=True) if cost_s <= waste * best_s * size)
    if cycle_s is None:
        most_s = float("inf") if latency_target_s is None else latency_target_s
        return min(efficient, _largest_within(sizes, costs_s, most_s))
    one_s = max(curve.compute_s(1, 1, context_tokens) for curve in machine.stages)
    stall_share, most_share = (min(share * max(queue, 1.0) ** 2, 1.0) for share in (_STALL_SHARE, _MOST_STALL_SHARE))

    def within(share: float) -> int:
        """Chunks that take such a share of a cycle where the second wish allows it."""
        stall_s = max(share * cycle_s, _STALL_STEPS * one_s)
        most_s = max(most_share * cycle_s, stall_s)
        if latency_target_s is not None:
            most_s = min(most_s, max(latency_target_s - cycle_s, 0.0))
        return min(
            max(efficient, _largest_within(sizes, costs_s, stall_s)),
            _largest_within(sizes, costs_s, most_s),
        )

    least, most = within(stall_share), within(max(stall_share, crowd))
    if least == most or not crowd_tokens:
        return most
    return min(
        (size for size in sizes if least <= size <= most),
        key=lambda size: _through_all_s(machine, crowd_tokens, size, context_tokens),
    )


def _through_all_s(machine: Machine, tokens: int, size: int, context_tokens: int) -> float:
    """How long so many prompt tokens take through all stages and links, in chunks of that size, where nothing waits."""
    times_s = [curve.compute_s(size, 1, context_tokens) for curve in machine.stages]
    if machine.links.rate_bytes_per_s is not None:
        times_s += [size * machine.token_bytes / machine.links.rate_bytes_per_s] * (len(machine.stages) - 1)
    return sum(times_s) + (ceil(tokens / size) - 1) * max(times_s)


def shared_chunk_tokens(
    machine: Machine, *, step_tokens: int, context_tokens: int, size: int, latency_target_s: float | None
) -> int:
    """Prompt tokens of a step that `size` sequences decode in as well.

    As many as fit; with a latency target, no stage may take longer than that.
    """
    if latency_target_s is None:
        return step_tokens
    sizes = grid(step_tokens)
    costs_s = [
        max(curve.compute_s(size + chunk, size + 1, (size + 1) * context_tokens) for curve in machine.stages)
        for chunk in sizes
    ]
    return _largest_within(sizes, costs_s, latency_target_s)


def along_tokens(machine: Machine, *, chunk_tokens: int, context_tokens: int, size: int, tries: bool) -> int:
    """Prompt tokens to compute in one pass with a decode step of `size` sequences.

    As many as every stage would itself take along (see `step_load.pays_together`) without making the decode step
    much longer; a few in any case. With `tries` one size more, because a size that is never run stays misjudged.
    """
    decode = StepLoad(tokens=size, prompt_tokens=0, sequences=size, context_tokens=size * context_tokens)
    sizes = [count for count in _ALONG_SIZES if count <= chunk_tokens]
    pays = 0
    for count in sizes:
        chunk = StepLoad(tokens=count, prompt_tokens=count, sequences=1, context_tokens=context_tokens)
        if not all(_rides_along(curve, decode, chunk) for curve in machine.stages):
            break
        pays += 1
    return sizes[min(max(pays + tries, 1), len(sizes)) - 1]


def riding_tokens(
    machine: Machine,
    *,
    cycle: Cycle,
    size: int,
    context_tokens: int,
    chunk_tokens: int,
    most: int,
) -> int:
    """Tokens of short prompts to put into a decode step of `size` sequences itself. 0: they go apart.

    While stages are busy a step of its own costs everybody another pass, and waits behind those who decode. So those
    ride that cost nothing, because a pass reads the weights anyway; and as many as have come for each decode step,
    because many in one step and none in the next cost more than as many in both. Where none is free, eight ride in any
    case, and more if they cost clearly less than in steps of their own. (Where they cost as much, those at least go
    into the gaps that decode leaves.) But no step shall be longer for it than by three quarters or by a chunk's step
    of its own, nor hold the slowest link up for more than a twentieth of a cycle. Where stages have time to spare, a
    step of its own is computed at once.
    """
    if cycle.stage_s < _RIDING_BUSY * cycle.cycle_s:
        return 0
    rate = machine.links.rate_bytes_per_s
    link_s = max(_RIDING_LINK_SHARE * cycle.cycle_s, _RIDING_LEAST_LINK_S)
    most_bytes = _RIDING_UNKNOWN_BYTES if rate is None else rate * link_s
    most = min(most, int(most_bytes / machine.token_bytes))
    if most < RIDING_LEAST:
        return 0
    decode = StepLoad(tokens=size, prompt_tokens=0, sequences=size, context_tokens=size * context_tokens)
    chunks_s = [curve.compute_s(chunk_tokens, 1, context_tokens) for curve in machine.stages]

    def delays_s(count: int) -> list[float]:
        chunk = StepLoad(tokens=count, prompt_tokens=count, sequences=1, context_tokens=context_tokens)
        return [_time_s(curve, decode + chunk) - _time_s(curve, decode) for curve in machine.stages]

    def cost(count: int, beyond: int = 0) -> float:
        """Of each token more than `beyond`, next to what it costs in a step of its own: at the dearest stage."""
        nothing_s = delays_s(beyond) if beyond else [0.0] * len(machine.stages)
        return max(
            (delay_s - before_s) / (count - beyond) * chunk_tokens / chunk_s
            for delay_s, before_s, chunk_s in zip(delays_s(count), nothing_s, chunks_s, strict=True)
        )

    def fits(count: int) -> bool:
        return count <= most and all(
            delay_s <= max(_RIDING_DELAY * _time_s(curve, decode), chunk_s)
            for curve, delay_s, chunk_s in zip(machine.stages, delays_s(count), chunks_s, strict=True)
        )

    free = max((count for count in _RIDING_SIZES if count <= most and cost(count) <= _RIDING_FREE), default=0)
    riding = max(free, RIDING_LEAST)
    coming = ceil(machine.riding * size)
    if coming > riding and fits(coming):
        riding = coming
    if free:
        return riding
    base = riding
    for count in _ALONG_SIZES:
        if count <= riding:
            continue
        if not fits(count) or cost(max(count, base + _RIDING_SPAN), base) > _RIDING_PRICE:
            break
        riding = count
    return riding


def _rides_along(curve: StageCurve, decode: StepLoad, chunk: StepLoad) -> bool:
    is_short = _time_s(curve, decode + chunk) <= (1.0 + _ALONG_DELAY) * _time_s(curve, decode)
    return is_short and pays_together(curve, decode, chunk)


def _time_s(curve: StageCurve, load: StepLoad) -> float:
    return curve.compute_s(load.tokens, load.sequences, load.context_tokens)


def chunks_under_way(machine: Machine, *, chunk_tokens: int, context_tokens: int, cycle: Cycle | None) -> int:
    """So many that the slowest of stages and link never waits for a chunk.

    The way round over what a chunk takes there, and one more. A stage has for chunks what decode leaves it.
    """
    slowest_s = 0.0
    payload_bytes = chunk_tokens * machine.token_bytes
    ring_s = machine.links.time_s(payload_bytes)
    for index, curve in enumerate(machine.stages):
        decode_share = 0.0 if cycle is None or cycle.cycle_s <= 0 else cycle.stages_s[index] / cycle.cycle_s
        stage_s = curve.compute_s(chunk_tokens, 1, context_tokens) / max(1.0 - decode_share, _LEAST_FREE_SHARE)
        slowest_s = max(slowest_s, stage_s)
        ring_s += stage_s
    if machine.links.rate_bytes_per_s is not None:
        slowest_s = max(slowest_s, payload_bytes / machine.links.rate_bytes_per_s)
    if ring_s >= slowest_s * MOST_CHUNKS_UNDER_WAY:
        return MOST_CHUNKS_UNDER_WAY
    return min(max(ceil(ring_s / slowest_s) + 1, len(machine.stages)), MOST_CHUNKS_UNDER_WAY)


def grid(step_tokens: int) -> list[int]:
    """The sizes a chunk may have: four an octave, from 16 to `step_tokens`."""
    sizes = []
    octave = LEAST_CHUNK
    while octave < step_tokens:
        sizes += [size for quarter in range(4) if (size := octave + quarter * octave // 4) < step_tokens]
        octave *= 2
    return [*sizes, step_tokens]


def _largest_within(sizes: list[int], costs_s: list[float], most_s: float) -> int:
    """The largest size that costs no more; the smallest if none does."""
    return max((size for size, cost_s in zip(sizes, costs_s, strict=True) if cost_s <= most_s), default=sizes[0])
