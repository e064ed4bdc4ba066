"""The processes that make up the system, and when one that ended is started again. Decisions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import orjson


class Kind(IntEnum):
    """What a part is. The value is its place in the order of stopping: those in front stop first."""

    GATEWAY = 0
    WORKER = 1
    SCHEDULER = 2
    REDIS = 3
    NATS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process to run."""

    name: str
    kind: Kind
    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what this process has."""
    port: int | None = None
    """On loopback; it listens there once it serves. None: it only talks over NATS."""
    stop_timeout_s: float = 5.0
    """How long it may take to stop before it is killed."""


def in_stop_order(parts: Sequence[Part]) -> list[list[Part]]:
    """Groups that stop one after the other; the parts of one group stop together."""
    return [group for kind in Kind if (group := [part for part in parts if part.kind is kind])]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How often and how soon a part that ended by itself is started again."""

    most: int = 8
    """In `within_s`; the next end is final."""
    within_s: float = 120.0
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0


def restart_pause_s(policy: RestartPolicy, ended_at_s: Sequence[float], now_s: float) -> float | None:
    """How long to wait before the part starts again, or None if it has had its chances.

    `ended_at_s` are the times at which it ended, this time included. A pause doubles with each recent end.
    """
    recent = sum(1 for at_s in ended_at_s if at_s > now_s - policy.within_s)
    if recent > policy.most:
        return None
    return min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** (recent - 1))


def last_words(log_text: str) -> str:
    """The line of a log that best explains why its process ended: the last problem, else the last line."""
    lines = [line.strip() for line in log_text.splitlines() if line.strip()]
    for line in reversed(lines):
        if (problem := _problem_in(line)) is not None:
            return problem
    return lines[-1] if lines else "it wrote nothing"


def _problem_in(line: str) -> str | None:
    """What a structured line of level warning or worse says, or None."""
    if not line.startswith("{"):
        # a plain line: only an exception's last line or a program's own complaint explains an end
        return line if "Error" in line or line.startswith("molink ") else None
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, dict) or fields.get("level") not in ("warning", "error"):
        return None
    event = str(fields.get("event", ""))
    if problem := fields.get("problem"):
        return f"{event}: {problem}"
    if trace := fields.get("traceback"):
        return f"{event}: {str(trace).strip().splitlines()[-1]}"
    return event


def exit_reason(return_code: int) -> str:
    """An exit code in words."""
    if return_code >= 0:
        return f"ended with exit code {return_code}"
    return f"was killed by signal {-return_code}"
