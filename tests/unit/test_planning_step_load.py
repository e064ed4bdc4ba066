"""Which steps are computed together, and how much of a prompt rides along."""

from __future__ import annotations

from dataclasses import replace

import pytest

from molink_common.wire import Entry, Logits
from molink_stage_worker.planning.chunks import along_tokens, riding_tokens
from molink_stage_worker.planning.cycle import Cycle, Machine
from molink_stage_worker.planning.ring import NO_LINKS, Links
from molink_stage_worker.planning.stage_cost import StageCurve
from molink_stage_worker.planning.step_load import StepLoad, pays_together


def curve(*points: tuple[float, float], per_token_s: float) -> StageCurve:
    tokens, times_s = zip(*points, strict=True)
    return StageCurve(
        tokens=tokens,
        times_s=times_s,
        fixed_s=times_s[0],
        per_token_s=per_token_s,
        per_sequence_s=0.0,
        per_context_token_s=0.0,
    )


KNEE = 32
ROOFLINE = curve(
    (1.0, 0.016), (8.0, 0.016), (16.0, 0.016), (32.0, 0.016), (64.0, 0.032), (128.0, 0.064), per_token_s=0.0005
)
"""A GPU: reads its weights until 32 tokens take as long to compute."""
AFFINE = curve((1.0, 0.009), (256.0, 0.264), per_token_s=0.001)
"""A CPU: 8 ms and 1 ms a token."""


def decode(tokens: int) -> StepLoad:
    return StepLoad(tokens=tokens, prompt_tokens=0, sequences=tokens, context_tokens=60 * tokens)


def chunk(tokens: int) -> StepLoad:
    return StepLoad(tokens=tokens, prompt_tokens=tokens, sequences=1, context_tokens=tokens)


def machine(*curves: StageCurve) -> Machine:
    shares = (0.0,) * len(curves)
    return Machine(stages=curves, prompt_shares=shares, riding=0.0, token_bytes=1000, links=NO_LINKS, scatter=0.1)


def along(*curves: StageCurve, size: int, chunk_tokens: int = 256, tries: bool = False) -> int:
    return along_tokens(machine(*curves), chunk_tokens=chunk_tokens, context_tokens=60, size=size, tries=tries)


# --- loads ----------------------------------------------------------------------------------------------------


def test_a_load_counts_prompt_tokens_apart() -> None:
    entries = (
        Entry(sequence=1, start=40, count=1, opens=False, logits=Logits.LAST),
        Entry(sequence=2, start=0, count=1, opens=True, logits=Logits.LAST),
        Entry(sequence=3, start=16, count=8, opens=False, logits=Logits.NONE),
    )
    load = StepLoad.of(entries)
    assert load == StepLoad(tokens=10, prompt_tokens=9, sequences=3, context_tokens=41 + 1 + 24)
    assert StepLoad.of(entries[:1]) + StepLoad.of(entries[1:]) == load
    assert StepLoad.of(()) + load == load


# --- steps that wait ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "pays"), [(8, True), (KNEE - 8, True), (KNEE, True), (64, False), (256, False)])
def test_until_the_weights_are_no_longer_the_limit_a_chunk_rides_for_little(other: int, pays: bool) -> None:
    assert pays_together(ROOFLINE, decode(8), chunk(other)) is pays


def test_two_decode_steps_under_the_knee_are_one_pass() -> None:
    assert pays_together(ROOFLINE, decode(16), decode(16))
    assert not pays_together(ROOFLINE, decode(64), decode(64))


@pytest.mark.parametrize(("other", "pays"), [(1, True), (7, True), (9, False), (64, False)])
def test_where_every_token_costs_only_small_steps_ride(other: int, pays: bool) -> None:
    assert pays_together(AFFINE, decode(8), chunk(other)) is pays


def test_nothing_is_joined_before_costs_are_known() -> None:
    assert not pays_together(None, decode(1), chunk(1))


# --- chunks that ride along -----------------------------------------------------------------------------------


def test_what_rides_along_ends_about_where_it_would_cost_time() -> None:
    assert along(ROOFLINE, size=8) == 28
    assert along(ROOFLINE, size=16) == 20


def test_the_slowest_to_gain_decides() -> None:
    assert along(ROOFLINE, AFFINE, size=8) == along(AFFINE, size=8) < along(ROOFLINE, size=8)


def test_the_smallest_rides_however_dear_it_is() -> None:
    assert along(AFFINE, size=4) == 8
    assert along(curve((1.0, 0.001), (256.0, 0.256), per_token_s=0.001), size=4) == 8


def test_a_try_is_one_size_more() -> None:
    assert along(ROOFLINE, size=8, tries=True) == 32
    assert along(ROOFLINE, size=16, tries=True) == 24


def test_never_more_than_a_chunk() -> None:
    assert along(ROOFLINE, size=4, chunk_tokens=16) == 16
    assert along(ROOFLINE, size=4, chunk_tokens=16, tries=True) == 16


# --- prompts that ride in a step ------------------------------------------------------------------------------


def riding(
    *curves: StageCurve,
    chunk_tokens: int = 16,
    rate_bytes_per_s: float | None = 12.5e6,
    busy: float = 0.9,
    comes: float = 0.0,
) -> int:
    cycle = Cycle(
        micro_batches=2, size=16, stages_s=(0.1 * busy,), stage_s=0.1 * busy, link_s=0.0, ring_s=0.1, cycle_s=0.1
    )  # fmt: skip
    links = Links(latency_s=0.0, s_per_byte=None, seen_bytes=1.0, rate_bytes_per_s=rate_bytes_per_s)
    return riding_tokens(
        replace(machine(*curves), links=links, riding=comes), cycle=cycle, size=16, context_tokens=60,
        chunk_tokens=chunk_tokens, most=256,
    )  # fmt: skip


def test_no_step_becomes_much_longer_for_those_who_ride() -> None:
    assert riding(AFFINE, chunk_tokens=8) == 16  # 24 ms for the 16 that decode, 18 more are allowed
    assert riding(AFFINE, chunk_tokens=16) == 24  # what a chunk of 16 takes


def test_more_than_the_free_ones_ride_only_where_that_is_cheaper_than_a_step_of_their_own() -> None:
    assert riding(AFFINE, chunk_tokens=32) == 40  # 1 ms a token, 1.25 in a chunk of 32
    assert riding(AFFINE, chunk_tokens=128) == 8  # 1.06
    assert riding(ROOFLINE, chunk_tokens=32) == 16  # 0.5 ms a token from here on, as apart
    assert riding(ROOFLINE, chunk_tokens=16) == 16  # 1 ms apart; but in two steps 16 each ride for nothing


def test_as_many_ride_as_come() -> None:
    assert riding(ROOFLINE, comes=0.5) == 16
    assert riding(ROOFLINE, comes=1.5) == 24  # 4 ms in every step, not 8 in half of them
    assert riding(ROOFLINE, comes=10.0) == 16  # no step may be so much longer
    assert riding(AFFINE, chunk_tokens=128, comes=1.25) == 20


def test_nobody_rides_where_a_link_would_notice() -> None:
    assert riding(AFFINE, rate_bytes_per_s=2.5e6) == 12  # 5 ms: 12.5 KB
    assert riding(AFFINE, rate_bytes_per_s=1e6) == 0
    assert riding(AFFINE, rate_bytes_per_s=None) == 24


def test_a_stage_with_time_to_spare_computes_prompts_at_once() -> None:
    assert riding(AFFINE, busy=0.2) == 0
