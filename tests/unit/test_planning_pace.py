"""Whether long prompts have time to go along with decode steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from molink_stage_worker.planning.cycle import Machine
from molink_stage_worker.planning.pace import PromptPace, alone_s
from molink_stage_worker.planning.ring import Links
from molink_stage_worker.planning.stage_cost import StageCurve

CURVE = StageCurve(
    tokens=(1.0, 100.0), times_s=(0.011, 0.11), fixed_s=0.01, per_token_s=0.001, per_sequence_s=0.0,
    per_context_token_s=0.0,
)  # fmt: skip
LINKS = Links(latency_s=0.05, s_per_byte=1e-7, seen_bytes=0.0, rate_bytes_per_s=1e7)
MACHINE = Machine(
    stages=(CURVE, CURVE), prompt_shares=(0.0, 0.0), riding=0.0, token_bytes=1000, links=LINKS, scatter=0.0
)


def has_time(pace: PromptPace, waiting_tokens: int, now_s: float) -> bool:
    """Of cycles of a tenth of a second that take 50 tokens along; the longest prompt would take 3 s alone."""
    return pace.has_time(
        waiting_tokens=waiting_tokens, tokens_a_cycle=50, cycle_s=0.1, longest_alone_s=3.0, now_s=now_s
    )


def test_a_prompt_alone_is_computed_by_every_stage_in_turn_and_sent() -> None:
    one_step_s = 2 * (0.01 + 0.1) + 0.05 + 100 * 1000 * 1e-7
    assert alone_s(MACHINE, prompt_tokens=100, step_tokens=100) == pytest.approx(one_step_s)
    two_steps_s = one_step_s + 2 * (0.01 + 0.05) + 50 * 1000 * 1e-7
    assert alone_s(MACHINE, prompt_tokens=150, step_tokens=100) == pytest.approx(two_steps_s)
    slower = replace(MACHINE, links=replace(LINKS, s_per_byte=1e-6))
    assert alone_s(slower, prompt_tokens=150, step_tokens=100) == pytest.approx(two_steps_s + 150 * 1000 * 9e-7)


def test_a_prompt_has_time_until_it_would_take_longer_than_alone() -> None:
    assert has_time(PromptPace(), 1500, 0.0)
    assert not has_time(PromptPace(), 1900, 0.0)

    pace = PromptPace()
    assert has_time(pace, 1500, 10.0)
    assert has_time(pace, 1250, 11.0), "2.5 s of work, and 2.6 s are left"
    assert not has_time(pace, 1000, 12.0), "others went along in its place"
    assert has_time(pace, 500, 12.5), "steps of its own have made up for it"


def test_prompts_that_queue_up_have_no_time() -> None:
    pace = PromptPace()
    assert has_time(pace, 1500, 0.0)
    assert not has_time(pace, 1500, 3.0), "the second has waited for the first"
    assert not has_time(pace, 1500, 60.0)


def test_time_begins_anew_when_nothing_waits() -> None:
    pace = PromptPace()
    assert has_time(pace, 1500, 0.0)
    assert not has_time(pace, 100, 3.0), "a few tokens need none"
    assert has_time(pace, 1500, 5.0)


def test_time_begins_anew_when_nobody_decodes() -> None:
    pace = PromptPace()
    assert has_time(pace, 1500, 0.0)
    assert not pace.has_time(waiting_tokens=900, tokens_a_cycle=0, cycle_s=0.0, longest_alone_s=3.0, now_s=1.0)
    assert has_time(pace, 1500, 60.0)
