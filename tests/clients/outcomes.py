"""What the clients' programs print, read and drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

_DETAIL_CHARACTERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One check of one client."""

    client: str
    check: str
    ok: bool
    detail: str
    seconds: float | None = None


def read_outcome(line: str) -> Outcome | None:
    """The outcome in a line of a program's output; None: it is something else."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    if not isinstance(told, dict) or not {"client", "check", "ok"} <= told.keys():
        return None
    return Outcome(
        client=str(told["client"]),
        check=str(told["check"]),
        ok=told["ok"] is True,
        detail=str(told.get("detail", "")),
        seconds=told.get("seconds"),
    )


def judged(client: str, outcomes: Sequence[Outcome], exit_code: int, last_words: str) -> list[Outcome]:
    """`outcomes`, and one more where the program did not do what it promises: check something, and exit by it."""
    if not outcomes:
        return [
            Outcome(client=client, check="program", ok=False, detail=f"checked nothing, exit {exit_code}: {last_words}")
        ]
    failed = any(not outcome.ok for outcome in outcomes)
    if exit_code != 0 and not failed:
        detail = f"every check passed, yet it exited with {exit_code}: {last_words}"
        return [*outcomes, Outcome(client=client, check="program", ok=False, detail=detail)]
    return list(outcomes)


def line_of(outcome: Outcome) -> str:
    """One outcome as a line of the terminal, a failure with all that is known of it."""
    took = "" if outcome.seconds is None else f"{outcome.seconds:6.1f} s"
    detail = outcome.detail if not outcome.ok else _short(outcome.detail)
    return f"  {'ok  ' if outcome.ok else 'FAIL'} {outcome.client:<14} {outcome.check:<28} {took:>8}  {detail}"


def table(outcomes: Sequence[Outcome], versions: dict[str, str]) -> str:
    """A row for each client: the version tried, how many checks passed, and which did not."""
    rows = [("client", "version", "passed", "failed")]
    for client in dict.fromkeys(outcome.client for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.client == client]
        failed = [outcome.check for outcome in own if not outcome.ok]
        passed = f"{len(own) - len(failed)} of {len(own)}"
        rows.append((client, versions.get(client, ""), passed, ", ".join(failed)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]).rstrip() for row in rows)


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _DETAIL_CHARACTERS else one_line[: _DETAIL_CHARACTERS - 1] + "…"
