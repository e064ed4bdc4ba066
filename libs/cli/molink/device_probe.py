"""Asks a child process what this machine offers to workers: only the stage worker's room may import torch."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import BaseModel, Field, ValidationError

from molink.leash import kill_group
from molink.supervisor import words_in
from molink_common.errors import MolinkError
from molink_common.messages import Dtype

_TIMEOUT_S = 120.0
_PROBE = """
import json, sys
from molink_common.errors import MolinkError
from molink_stage_worker.hardware import inspect
try:
    found = inspect(device=sys.argv[1], memory_bytes=None)
except MolinkError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({
        "device": found.device,
        "name": found.device_name,
        "memory_bytes": found.memory_bytes,
        "native_dtypes": found.native_dtypes,
    }))
"""


class Device(BaseModel):
    """What a worker would compute on here."""

    device: str
    name: str
    memory_bytes: Annotated[int, Field(gt=0)]
    """What one worker alone would offer."""
    native_dtypes: Annotated[tuple[Dtype, ...], Field(min_length=1)]
    """Best first."""


async def probe_device(wanted: str, *, log: Path) -> Device:
    """The device that ``--device wanted`` means on this machine.

    Raises:
        MolinkError: there is none such, or torch cannot be used here.
    """
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PROBE, wanted),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        raise MolinkError(f"looking for a device took longer than {_TIMEOUT_S:g} s (log: {log})") from None
    finally:
        kill_group(process.pid)
    return read_device(out.decode(errors="replace"), log)


def read_device(text: str, log: Path) -> Device:
    """What the child printed last.

    Raises:
        MolinkError: the child's own reason, or that it gave none.
    """
    try:
        body = orjson.loads(text.strip().rpartition("\n")[2])
        if isinstance(body, dict) and "error" in body:
            raise MolinkError(str(body["error"]))
        return Device.model_validate(body)
    except (orjson.JSONDecodeError, ValidationError):
        raise MolinkError(f"torch cannot be used on this machine: {words_in(log)} (log: {log})") from None
