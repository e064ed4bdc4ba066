"""What this machine can do: device, number formats, memory."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from molink_common.errors import SettingsError
from molink_common.messages import Dtype

_OFFERED_SHARE = 0.8
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT_BYTES = 1 << 60
_MEASURED_BYTES = 64 * 2**20
"""More than the caches of most devices hold."""
_MEASURED_COLUMNS = 4096
_MEASURED_AT_ONCE_BYTES = 8 * 2**20
"""On a CPU: takes less than the system leaves a process its core at a time."""
_MEASURED_TIMES = 8
_MEASURED_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device and what it offers."""

    device: str
    device_name: str
    native_dtypes: tuple[Dtype, ...]
    """Best first."""
    memory_bytes: int
    """For weights and KV blocks together."""
    parameters_per_s: float | None = None
    """How many parameters a decode step passes in a second, in the best format; None: not measured."""


def usable_threads() -> int:
    """Threads that torch would take (``OMP_NUM_THREADS``, else one a core), and not all that a container may use.

    One core is left to what goes on beside computing: messages, the broker, the system.
    """
    quota = _cgroup_cores()
    cores = torch.get_num_threads() if quota is None else min(torch.get_num_threads(), math.ceil(quota))
    return max(cores - 1, 1)


def inspect(*, device: str, memory_bytes: int | None) -> Hardware:
    """The device that the setting means; `memory_bytes` None offers 80 % of what is available now.

    Measures its speed, with the threads that torch is set to, which takes a fraction of a second.

    Raises:
        SettingsError: the device is not there.
    """
    chosen = _choose_device(device)
    native_dtypes = _native_dtypes(chosen)
    return Hardware(
        device=chosen,
        device_name=_device_name(chosen),
        native_dtypes=native_dtypes,
        parameters_per_s=parameters_per_s(chosen, native_dtypes[0]),
        memory_bytes=int(_available_bytes(chosen) * _OFFERED_SHARE) if memory_bytes is None else memory_bytes,
    )


def rss_bytes() -> int:
    """Memory that this process occupies now."""
    return int(psutil.Process().memory_info().rss)


def parameters_per_s(device: str, dtype: Dtype, *, within_s: float = _MEASURED_WITHIN_S) -> float | None:
    """How many weights a product of a matrix and a vector passes in a second, the best of a few.

    None where it cannot be measured. A decode step is a row of such products, and each reads its weights once, from
    memory. Whatever else the machine does can only make it slower, so the best of several counts: on a CPU of each
    part by itself, and of these the median, because workers that start together share its cores, and hardly ever has
    one of them a core for it all.
    """
    kind: torch.dtype = getattr(torch, dtype)
    rows = _MEASURED_BYTES // (_MEASURED_COLUMNS * kind.itemsize)
    at_once = _MEASURED_AT_ONCE_BYTES if device == "cpu" else _MEASURED_BYTES
    began_s = time.perf_counter()
    try:
        weights = torch.ones(rows, _MEASURED_COLUMNS, dtype=kind, device=device)
        token = torch.ones(1, _MEASURED_COLUMNS, dtype=kind, device=device)
        parts = torch.split(weights, at_once // (_MEASURED_COLUMNS * kind.itemsize))
        with torch.inference_mode():
            _passed_s(token, parts[0])  # the first one also sets the libraries up
            shortest_s = [math.inf] * len(parts)
            for _ in range(_MEASURED_TIMES):
                shortest_s = [min(best, _passed_s(token, part)) for best, part in zip(shortest_s, parts, strict=True)]
                if time.perf_counter() - began_s >= within_s:
                    break
    except RuntimeError:  # no memory is free, or no such product is there: the worker serves nevertheless
        return None
    return rows * _MEASURED_COLUMNS / (len(parts) * median(shortest_s))


def _passed_s(token: torch.Tensor, weights: torch.Tensor) -> float:
    began_s = time.perf_counter()
    result = torch.nn.functional.linear(token, weights)
    result[0, 0].item()  # waits until the device has computed it
    return time.perf_counter() - began_s


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


def _cgroup_cores(folder: Path = _CGROUP) -> float | None:
    """How many cores a container may use, or None without a limit. Reads both versions of control groups."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu/cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota in {"max", "-1"} else float(quota) / float(period)


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
