"""What a container's limits leave, under both versions of control groups, and how fast a device is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from molink_common.messages import Dtype
from molink_stage_worker import hardware
from molink_stage_worker.hardware import _cgroup_cores, _cgroup_room_bytes, inspect, parameters_per_s, usable_threads


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, None),
        ({"memory.max": "max\n", "memory.current": "5\n"}, None),
        ({"memory.max": "100\n", "memory.current": "40\n"}, 60),
        ({"memory.max": "100\n", "memory.current": "140\n"}, 0),
        ({"memory/memory.limit_in_bytes": "100\n", "memory/memory.usage_in_bytes": "30\n"}, 70),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "30\n"}, None),
    ],
)
def test_the_room_below_a_limit(tmp_path: Path, files: dict[str, str], room: int | None) -> None:
    assert _cgroup_room_bytes(write(tmp_path, files)) == room


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "garbage\n"}, None),
    ],
)
def test_a_containers_cores(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    assert _cgroup_cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("torch_threads", "quota", "threads"),
    [(8, None, 7), (8, 2.5, 2), (2, None, 1), (1, None, 1), (4, 0.5, 1), (2, 8.0, 1)],
)
def test_one_core_is_left(
    torch_threads: int, quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    monkeypatch.setattr(hardware, "_cgroup_cores", lambda: quota)
    assert usable_threads() == threads


def test_the_speed_is_measured_in_any_format_and_within_bounds_of_reason() -> None:
    for dtype in Dtype:
        speed = parameters_per_s("cpu", dtype)
        # from a single slow core to far more than any CPU reads
        assert speed is not None and 1e7 < speed < 1e13
    assert inspect(device="cpu", memory_bytes=1).parameters_per_s is not None


def test_who_never_has_its_core_for_long_measures_the_same_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    # every third product waits for the core: so every time that all the weights are passed is disturbed,
    # and every eighth does: so one part of the weights is never passed in peace
    monkeypatch.setattr(
        hardware, "_passed_s", lambda _token, _weights: 0.1 if 0 in ((call := next(calls)) % 3, call % 8) else 0.001
    )
    speed = parameters_per_s("cpu", Dtype.BFLOAT16, within_s=60.0)
    assert speed == pytest.approx(64 * 2**20 / 2 / (8 * 0.001))


def test_a_device_that_cannot_be_measured_has_no_speed() -> None:
    assert parameters_per_s("meta", Dtype.FLOAT32) is None
