"""What can be set on a stage worker, and what the machine says of itself."""

from __future__ import annotations

import psutil
import pytest

from molink_common.errors import SettingsError
from molink_common.messages import Dtype
from molink_common.settings import KNOWN_VARIABLES, read_settings, variable_of
from molink_stage_worker.hardware import inspect, rss_bytes
from molink_stage_worker.settings import StageWorkerSettings, size_bytes


def read(*arguments: str) -> StageWorkerSettings:
    return read_settings(StageWorkerSettings, arguments, {}, program="molink worker")


def test_sizes_carry_a_unit() -> None:
    assert size_bytes("4GiB") == 4 << 30
    assert size_bytes("1.5 MiB") == 3 << 19
    for wrong in ("4", "4GB", "-1GiB", "", "GiB"):
        with pytest.raises(ValueError, match="a size is"):
            size_bytes(wrong)


def test_wrong_settings_are_refused_by_name() -> None:
    assert read("--memory", "2GiB", "--device", "cuda:1", "--threads", "2").threads == 2
    for flags in (["--memory", "much"], ["--device", "tpu"], ["--threads", "0"], ["--worker-id", "a.b"]):
        with pytest.raises(SettingsError, match=flags[0]):
            read(*flags)


def test_every_part_tolerates_the_variables_of_this_one() -> None:
    assert {variable_of(field) for field in StageWorkerSettings.model_fields} <= KNOWN_VARIABLES | {
        variable_of(field) for field in StageWorkerSettings.model_fields if field.startswith(("nats", "log", "otlp"))
    } | {"MOLINK_TRACE_SHARE"}


def test_the_cpu_is_always_there() -> None:
    found = inspect(device="cpu", memory_bytes=None)
    assert found.device == "cpu"
    assert found.device_name
    assert Dtype.FLOAT32 in found.native_dtypes
    assert 0 < found.memory_bytes < psutil.virtual_memory().total
    assert inspect(device="cpu", memory_bytes=123).memory_bytes == 123
    assert rss_bytes() > 0


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="cuda:99"):
        inspect(device="cuda:99", memory_bytes=None)
