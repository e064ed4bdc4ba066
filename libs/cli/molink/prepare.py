"""Has the model prepared by a child process, which downloads and converts what is missing, and shows how far it is.

The child is ``python -m molink_stage_worker.models REF``. It prints JSON lines: ``{"doing": …, "share": …}`` while
it works, and at the end either ``{"card": …, "folder": …}`` or ``{"error": …}``. A child, because this process
must hold neither torch nor a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from molink.leash import kill_group
from molink.supervisor import python_command, words_in
from molink_common.errors import ModelError
from molink_common.messages import ModelCard

_LONGEST_LINE_BYTES = 4 * 1024 * 1024
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Working:
    """What the child does, and which share of it is done (None: unknown)."""

    doing: str
    share: float | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model lies ready on this machine."""

    card: ModelCard
    folder: str


def read_report(line: str) -> Working | Prepared | None:
    """What a line of the child says; None for a line that is none of its reports.

    Raises:
        ModelError: the child says that the model cannot be had.
    """
    try:
        body = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict):
        return None
    if "error" in body:
        raise ModelError(str(body["error"]))
    if "card" in body:
        try:
            return Prepared(ModelCard.model_validate(body["card"]), str(body.get("folder", "")))
        except ValidationError as error:
            raise ModelError(f"the model's card cannot be read: {error.errors()[0]['msg']}") from error
    if "doing" in body:
        share = body.get("share")
        if not isinstance(share, int | float) or not math.isfinite(share):
            return Working(str(body["doing"]), None)
        return Working(str(body["doing"]), min(1.0, max(0.0, float(share))))
    return None


async def prepare_model(reference: str, *, log: Path, console: Console) -> Prepared:
    """The model's card, once everything of it lies on this machine. Ends the child when it is cancelled.

    Raises:
        ModelError: it does not exist, cannot be fetched or cannot be served.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("looking for the model", total=None)
        said = ""
        async for report in _reports(reference, log):
            if isinstance(report, Prepared):
                return report
            if report.doing != said and not console.is_terminal:
                console.print(f"  {report.doing} …", highlight=False, markup=False)
            said = report.doing
            bar.update(task, description=report.doing, total=None if report.share is None else 1.0)
            bar.update(task, completed=report.share or 0.0)
    raise ModelError(f"preparing the model ended without a result: {words_in(log)} (log: {log})")


async def _reports(reference: str, log: Path) -> AsyncIterator[Working | Prepared]:
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *python_command("molink_stage_worker.models", reference),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            limit=_LONGEST_LINE_BYTES,
        )
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            report = read_report(line.decode(errors="replace"))
            if report is not None:
                yield report
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        kill_group(process.pid)
    await process.wait()
