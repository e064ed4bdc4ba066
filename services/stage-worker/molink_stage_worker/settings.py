"""The stage worker's settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from molink_common.messages import PeerId
from molink_common.settings import ServiceSettings

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class StageWorkerSettings(ServiceSettings):
    """Holds some of a model's layers and computes them for a pipeline."""

    worker_id: Annotated[PeerId | None, Field(description="name of this worker; none: made from the host's name")] = (
        None
    )
    site: Annotated[str, Field(description="where this machine stands; machines of one site have fast links")] = (
        "default"
    )
    model: Annotated[str | None, Field(description="where this machine has the model, if not where the pool says")] = (
        None
    )
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, mps")] = "auto"
    memory: Annotated[str, Field(description="memory to offer, as 4GiB; auto: 80 % of what is available")] = "auto"
    threads: Annotated[
        int | None, Field(ge=1, le=256, description="threads that compute, a core for each; none: all cores but one")
    ] = None
    cache: Annotated[Path | None, Field(description="folder for models; none: the user's cache folder")] = None
    step_tokens: Annotated[
        int | None,
        Field(ge=1, le=65536, description="most tokens a step, as head; none: 128 on a CPU, else 1024"),
    ] = None
    max_running: Annotated[int, Field(ge=1, le=4096, description="most sequences at work at once (as head)")] = 64
    journal: Annotated[
        str, Field(description="memory for what was sent on, from which a replaced next stage is filled again")
    ] = "256MiB"
    prefix_cache: Annotated[
        bool, Field(description="whether a prompt begins with what an earlier one of its tenant has computed (as head)")
    ] = True
    drain_timeout_s: Annotated[
        float, Field(ge=0, le=3600, description="how long to wait at the end until the stage is placed elsewhere")
    ] = 10.0

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, text: str) -> str:
        if text != "auto":
            size_bytes(text)
        return text

    @field_validator("journal")
    @classmethod
    def _journal_is_a_size(cls, text: str) -> str:
        size_bytes(text)
        return text

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, text: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
            raise ValueError("must be auto, cpu, cuda, cuda:<number> or mps")
        return text


def size_bytes(text: str) -> int:
    """``4GiB`` → 4294967296. Units are B, KiB, MiB, GiB, TiB.

    Raises:
        ValueError: it is not such a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a size is a number and one of {', '.join(_UNITS)}, as 4GiB; not {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
