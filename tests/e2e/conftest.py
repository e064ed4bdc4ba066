"""One real system for the session: the demo model on two workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.running_system import RunningSystem, start_system

READY_TIMEOUT_S = 180.0


@pytest.fixture(scope="session")
def running_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    system = start_system(tmp_path_factory.mktemp("up") / "up.log", "--workers", "2", "--memory", "1500MiB")
    try:
        system.wait_until_printed("Ctrl-C stops everything", READY_TIMEOUT_S)
        yield system
    finally:
        system.stop()
