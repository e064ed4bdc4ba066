"""Whether a long prompt may take its time."""

from __future__ import annotations

from molink_stage_worker.batch_plan import BACKLOG_CYCLES
from molink_stage_worker.planning.cycle import Machine

_PATIENCE = 1.2
"""How much longer than alone a prompt may take beside those who decode. Whatever its turn, it would wait for them."""


def alone_s(machine: Machine, *, prompt_tokens: int, step_tokens: int) -> float:
    """What a prompt's first token takes where nobody else is: computed in the largest steps, then sent as one."""
    full, rest = divmod(prompt_tokens, step_tokens)
    context_tokens = prompt_tokens // 2  # in the middle of its steps
    compute_s = 0.0
    for curve in machine.stages:
        compute_s += full * curve.compute_s(step_tokens, 1, context_tokens)
        compute_s += curve.compute_s(rest, 1, context_tokens) if rest else 0.0
    return compute_s + machine.links.time_s(prompt_tokens * machine.token_bytes)


class PromptPace:
    """Prompts that only go along with decode steps cost those who decode least, and take longest.

    They have time for that as long as the longest waits little longer for its first token than if it were alone. That
    counts from when more tokens began to wait than a few cycles take along; so prompts that queue up have none. No
    clock: the time is an argument, in seconds.
    """

    def __init__(self) -> None:
        self._waiting_since_s: float | None = None

    def has_time(
        self, *, waiting_tokens: int, tokens_a_cycle: int, cycle_s: float, longest_alone_s: float, now_s: float
    ) -> bool:
        """Whether what waits is computed in time if only `tokens_a_cycle` of it go along.

        `longest_alone_s` is what the longest of the prompts would take alone (see `alone_s`). False for a few tokens:
        they need no time; and where none go along, because nobody decodes.
        """
        if not tokens_a_cycle or waiting_tokens <= BACKLOG_CYCLES * tokens_a_cycle:
            self._waiting_since_s = None
            return False
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        needs_s = waiting_tokens / tokens_a_cycle * cycle_s
        return now_s + needs_s <= self._waiting_since_s + _PATIENCE * longest_alone_s
