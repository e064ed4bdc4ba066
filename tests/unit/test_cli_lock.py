from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from molink.folders import KEPT_RUNS, new_run_folder
from molink.lock import AlreadyRunning, Holder, current_holder, hold, holders, lock_file

HERE = Holder(pid=1234, port=8000, url="http://127.0.0.1:8000")


def test_a_second_run_on_the_same_port_is_told_who_runs(tmp_path: Path) -> None:
    message = r"8000 \(pid 1234\).*molink down --port 8000"
    with hold(tmp_path, HERE), pytest.raises(AlreadyRunning, match=message), hold(tmp_path, HERE):
        pass


def test_another_port_is_free(tmp_path: Path) -> None:
    other = Holder(pid=1, port=8001, url="u")
    with hold(tmp_path, HERE), hold(tmp_path, other):
        assert holders(tmp_path) == [HERE, other]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with hold(tmp_path, HERE):
        assert current_holder(tmp_path, 8000) == HERE
    assert list(tmp_path.iterdir()) == []
    assert current_holder(tmp_path, 8000) is None
    with hold(tmp_path, HERE):
        pass


def test_a_stale_file_is_taken_over(tmp_path: Path) -> None:
    lock_file(tmp_path, 8000).write_text(json.dumps({"pid": 1, "port": 8000, "url": "a longer address than ours"}))
    with hold(tmp_path, HERE):
        assert current_holder(tmp_path, 8000) == HERE
    lock_file(tmp_path, 8000).write_text("{}")
    assert holders(tmp_path) == []


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from molink.lock import Holder, hold
with hold(Path({str(tmp_path)!r}), Holder(pid=1, port=8000, url="u")):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunning), hold(tmp_path, HERE):
            pass
        process.kill()
        process.wait()
    with hold(tmp_path, HERE):
        pass


def test_only_a_few_runs_of_each_port_are_kept(tmp_path: Path) -> None:
    made = [new_run_folder(tmp_path, 8000, now_s=float(number)) for number in range(KEPT_RUNS + 3)]
    other = new_run_folder(tmp_path, 80, now_s=0.0)
    same_second = new_run_folder(tmp_path, 8000, now_s=float(KEPT_RUNS + 2))
    kept = set((tmp_path / "runs").iterdir())
    assert kept == {*made[-(KEPT_RUNS - 1) :], same_second, other}
