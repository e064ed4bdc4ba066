"""Has a child process look at this machine and prepare the model, and shows how far it is.

A child, because this process must hold neither torch nor a model; one child for both, because importing torch
takes seconds. It prints JSON lines: first what workers can compute on, then ``{"doing": …, "share": …}`` while it
downloads and converts what is missing, and last either ``{"card": …, "folder": …}`` or ``{"error": …}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from molink.leash import Leash, kill_group
from molink.supervisor import words_in
from molink_common.errors import ModelError
from molink_common.messages import Dtype, ModelCard

_LONGEST_LINE_BYTES = 4 * 1024 * 1024
_STOP_TIMEOUT_S = 5.0
_CHILD = """
import json, sys
from molink_common.errors import MolinkError
from molink_stage_worker.hardware import inspect
from molink_stage_worker.models.__main__ import main

reference, device = sys.argv[1:]
try:
    found = inspect(device=device, memory_bytes=None)
except MolinkError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit(1)
print(json.dumps({
    "device": found.device,
    "name": found.device_name,
    "memory_bytes": found.memory_bytes,
    "native_dtypes": found.native_dtypes,
}), flush=True)
sys.exit(main(["--", reference]))
"""


class Device(BaseModel):
    """What a worker would compute on here."""

    device: str
    name: str
    memory_bytes: Annotated[int, Field(gt=0)]
    """What one worker alone would offer."""
    native_dtypes: Annotated[tuple[Dtype, ...], Field(min_length=1)]
    """Best first."""


@dataclass(frozen=True, slots=True)
class Working:
    """What the child does, and which share of it is done (None: unknown)."""

    doing: str
    share: float | None


Report = Device | Working | ModelCard


def read_report(line: str) -> Report | None:
    """What a line of the child says; None for a line that is none of its reports.

    Raises:
        ModelError: the child says that there is no such device, or that the model cannot be had.
    """
    try:
        body = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict):
        return None
    if "error" in body:
        raise ModelError(str(body["error"]))
    try:
        if "card" in body:
            return ModelCard.model_validate(body["card"])
        if "device" in body:
            return Device.model_validate(body)
    except ValidationError as error:
        raise ModelError(f"the stage worker's room says what cannot be read: {error.errors()[0]['msg']}") from error
    if "doing" in body:
        return Working(str(body["doing"]), _share(body.get("share")))
    return None


def _share(value: object) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(1.0, max(0.0, float(value)))


async def prepare(
    reference: str, device: str, *, log: Path, leash: Leash, console: Console
) -> tuple[ModelCard, Device]:
    """The model's card, once everything of it lies on this machine, and the device that workers compute on.

    Raises:
        ModelError: the model does not exist, cannot be fetched or cannot be served; or there is no such device.
    """
    found: Device | None = None
    said = ""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    # closing the generator is what ends the child when we leave early
    async with contextlib.aclosing(_reports(reference, device, log, leash)) as reports:
        with bar:
            task = bar.add_task("looking for the model", total=None)
            async for report in reports:
                match report:
                    case Device():
                        found = report
                    case ModelCard():
                        assert found is not None, "the child names the device first"
                        return report, found
                    case Working(doing, share):
                        if doing != said and not console.is_terminal:
                            console.print(f"  {doing} …", markup=False)
                        said = doing
                        total = None if share is None else 1.0
                        bar.update(task, description=doing, total=total, completed=share or 0.0)
    raise ModelError(f"preparing the model ended without a result: {words_in(log)} (log: {log})")


async def _reports(reference: str, device: str, log: Path, leash: Leash) -> AsyncGenerator[Report, None]:
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CHILD, reference, device),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            limit=_LONGEST_LINE_BYTES,
        )
    leash.put_on(process.pid)
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            report = read_report(line.decode(errors="replace"))
            if report is not None:
                yield report
    finally:
        await _end(process)
        leash.take_off(process.pid)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask it to stop, so that it removes what it has half done; kill it if it takes too long."""
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
