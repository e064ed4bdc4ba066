"""Where a new sequence is expected to finish first. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is known of a pipeline's load."""

    pipeline: int
    assigned: int
    """Sequences that the scheduler has sent there and that have not ended."""
    reported: int
    """Of these, how many the head knew of when it predicted `cycle_s`."""
    cycle_s: float | None
    """Predicted time between two tokens of a stream; None where nothing was measured yet."""


def finish_s(load: Load, *, tokens: int) -> float | None:
    """When one more sequence of so many tokens would be finished there, from now.

    The time between two tokens grows with the streams that share the pipeline: in proportion, at worst.
    """
    if load.cycle_s is None:
        return None
    return tokens * load.cycle_s * max(1.0, (load.assigned + 1) / max(load.reported, 1))


def first_to_finish(loads: Sequence[Load], *, tokens: int) -> int:
    """The number of the pipeline to choose; where one has not measured anything yet, the one with the least to do."""
    times_s = {load.pipeline: finish_s(load, tokens=tokens) for load in loads}
    if any(time_s is None for time_s in times_s.values()):
        return min(loads, key=lambda load: (load.assigned, load.pipeline)).pipeline
    return min(loads, key=lambda load: (times_s[load.pipeline], load.pipeline)).pipeline
