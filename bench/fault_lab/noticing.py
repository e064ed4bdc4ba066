"""When the system noticed a fault, from the structured logs of its schedulers. Decisions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from bench.fault_lab.plan import FaultKind

SCHEDULER_ACTIVE = "scheduler active"
_STANDING_BY = ("another scheduler is active; standing by", "another scheduler has taken over; standing by")
_WORKER_LOST = "worker lost"
_BUS_DISCONNECTED = "bus disconnected"
_STORE_SILENT = "the store does not answer; trying again for ever"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A line of a log."""

    part: str
    at_s: float
    """Seconds since 1970, to the millisecond."""
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_events(part: str, log_text: str) -> list[Event]:
    """The structured lines of a part's log; others, such as a traceback or half a line, are left out."""
    events = []
    for line in log_text.splitlines():
        try:
            body = orjson.loads(line)
            at_s = datetime.fromisoformat(body["at"]).timestamp()
            events.append(Event(part=part, at_s=at_s, event=body["event"], fields=body))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
    return events


def noticed_after_s(kind: FaultKind, target: str, done_at_s: float, events: Iterable[Event]) -> float | None:
    """Seconds from a fault to the first word of a scheduler about it; None: it said nothing.

    Logs have no more than milliseconds, so that a delay below one may show as 0.
    """
    # a log's time is cut off to the millisecond, the fault's is not
    times = [event.at_s for event in events if event.at_s >= done_at_s - 0.001 and _tells_of(event, kind, target)]
    return round(max(0.0, min(times) - done_at_s), 3) if times else None


def _tells_of(event: Event, kind: FaultKind, target: str) -> bool:
    match kind:
        case FaultKind.KILL_SCHEDULER:
            return event.event == SCHEDULER_ACTIVE and event.part != target
        case FaultKind.RESTART_NATS:
            return event.event == _BUS_DISCONNECTED
        case FaultKind.RESTART_REDIS:
            return event.event == _STORE_SILENT
        case FaultKind.KILL_GATEWAY:
            return False  # nothing in the system waits for it; its clients know at once
        case _:
            return event.event == _WORKER_LOST and event.fields.get("worker") == target


def active_scheduler(events: Iterable[Event], running: Iterable[str]) -> str | None:
    """Which of the `running` schedulers became active last and has not stood back since; None: nobody."""
    names = set(running)
    active: str | None = None
    for event in sorted(events, key=lambda event: event.at_s):
        if event.event == SCHEDULER_ACTIVE:
            active = event.part
        elif event.event in _STANDING_BY and event.part == active:
            active = None
    return active if active in names else None


def standing_by(events: Iterable[Event], name: str, since_s: float) -> bool:
    """Whether a scheduler has said since its start that it waits for the active one to go."""
    return any(event.part == name and event.event in _STANDING_BY and event.at_s >= since_s for event in events)
