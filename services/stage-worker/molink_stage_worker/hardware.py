"""What this machine can do: device, number formats, memory."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from molink_common.errors import SettingsError
from molink_common.messages import Dtype

_OFFERED_SHARE = 0.8
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device and what it offers."""

    device: str
    device_name: str
    native_dtypes: tuple[Dtype, ...]
    """Best first."""
    memory_bytes: int
    """For weights and KV blocks together."""


def inspect(*, device: str, memory_bytes: int | None) -> Hardware:
    """The device that the setting means; `memory_bytes` None offers 80 % of what is available now.

    Raises:
        SettingsError: the device is not there.
    """
    chosen = _choose_device(device)
    return Hardware(
        device=chosen,
        device_name=_device_name(chosen),
        native_dtypes=_native_dtypes(chosen),
        memory_bytes=int(_available_bytes(chosen) * _OFFERED_SHARE) if memory_bytes is None else memory_bytes,
    )


def rss_bytes() -> int:
    """Memory that this process occupies now."""
    return int(psutil.Process().memory_info().rss)


def _choose_device(wanted: str) -> str:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda:0" if has_cuda else "mps" if has_mps else "cpu"
    if wanted.startswith("cuda"):
        number = int(wanted.partition(":")[2] or 0)
        if not has_cuda or number >= torch.cuda.device_count():
            count = torch.cuda.device_count() if has_cuda else 0
            raise SettingsError(f"--device {wanted}: torch finds {count} CUDA devices here; use cpu or auto")
        return f"cuda:{number}"
    if wanted == "mps" and not has_mps:
        raise SettingsError("--device mps: torch finds no Metal device here; use cpu or auto")
    return wanted


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    if device == "cpu" and _CPUINFO.exists():
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or device


def _native_dtypes(device: str) -> tuple[Dtype, ...]:
    if device.startswith("cuda"):
        # bf16 has its own matrix units from compute capability 8.0 on; before that it is emulated
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return (Dtype.BFLOAT16, Dtype.FLOAT16, Dtype.FLOAT32)
        return (Dtype.FLOAT16, Dtype.FLOAT32)
    if device == "mps":
        return (Dtype.FLOAT16, Dtype.FLOAT32)
    return (Dtype.BFLOAT16, Dtype.FLOAT32) if _cpu_multiplies_bf16() else (Dtype.FLOAT32,)


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-BF16, AMX, ARM's bf16), which torch then uses."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        flags = _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""
        return " bf16" in flags
    # these are private, so their absence in another release of torch must not end the worker
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe() for probe in probes if probe is not None)


def _available_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_room_bytes()
    return available if limit is None else min(available, limit)


def _cgroup_room_bytes(folder: Path = _CGROUP) -> int | None:
    """What a container's limit leaves, or None without a limit. Reads both versions of control groups."""
    names = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit_name, used_name in names:
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
        except (OSError, ValueError):
            continue
        # the older version says "no limit" with a number near the largest there is
        return None if limit == "max" or int(limit) >= _NO_LIMIT_BYTES else max(int(limit) - used, 0)
    return None
