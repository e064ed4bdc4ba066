"""The supervisor with small real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from molink.embedded import free_port
from molink.leash import Leash
from molink.parts import Kind, Part, RestartPolicy
from molink.supervisor import PartFailed, Supervisor, supervise

SLEEP = "import time; time.sleep(60)"


def python_part(folder: Path, name: str, code: str, kind: Kind = Kind.WORKER, port: int | None = None) -> Part:
    command = (sys.executable, "-I", "-S", "-c", textwrap.dedent(code))
    return Part(name=name, kind=kind, command=command, log=folder / f"{name}.log", port=port, stop_timeout_s=1.0)


@pytest.fixture
def leash() -> Iterator[Leash]:
    with Leash() as held:
        yield held


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # an orphan that nobody has reaped yet is dead all the same
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  another process cannot set an event
            await asyncio.sleep(0.01)


def find_failure(group: BaseExceptionGroup[BaseException]) -> PartFailed:
    (failure,) = group.exceptions
    assert isinstance(failure, PartFailed)
    return failure


async def test_parts_run_and_have_ended_afterwards(tmp_path: Path, leash: Leash) -> None:
    async with supervise(say=print, leash=leash) as supervisor:
        await supervisor.start(python_part(tmp_path, "a", SLEEP))
        await supervisor.start(python_part(tmp_path, "b", SLEEP, Kind.GATEWAY))
        pids = supervisor.process_ids
        assert all(is_alive(pid) for pid in pids.values())
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids.values())


async def test_parts_stop_in_order(tmp_path: Path, leash: Leash) -> None:
    order = tmp_path / "order"
    code = """
        import signal, sys
        def stop(*_):
            with open({order!r}, "a") as file: file.write({name!r} + " ")
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        open({ready!r}, "w").close()
        signal.pause()
    """
    async with supervise(say=print, leash=leash) as supervisor:
        for name, kind in (("scheduler", Kind.SCHEDULER), ("gateway", Kind.GATEWAY), ("worker", Kind.WORKER)):
            ready = tmp_path / f"{name}.ready"
            text = code.format(order=str(order), name=name, ready=str(ready))
            await supervisor.start(python_part(tmp_path, name, text, kind))
            await until(ready.exists)
    assert order.read_text().split() == ["gateway", "worker", "scheduler"]


async def test_a_part_that_ignores_the_signal_is_killed_with_what_it_started(tmp_path: Path, leash: Leash) -> None:
    note = tmp_path / "grandchild"
    code = f"""
        import signal, subprocess, sys, os
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {SLEEP!r}])
        with open({str(note) + ".part"!r}, "w") as file: file.write(str(child.pid))
        os.rename({str(note) + ".part"!r}, {str(note)!r})
        signal.pause()
    """
    async with supervise(say=print, leash=leash) as supervisor:
        await supervisor.start(python_part(tmp_path, "stubborn", code))
        pid = supervisor.process_ids["stubborn"]
        await until(note.exists)
    assert not is_alive(pid)
    await until(lambda: not is_alive(int(note.read_text())))


async def test_an_end_before_all_is_up_is_a_failure_with_the_last_words(tmp_path: Path, leash: Leash) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with supervise(say=print, leash=leash) as supervisor:
            await supervisor.start(python_part(tmp_path, "bad", "raise RuntimeError('no such model')"))
            await asyncio.sleep(10)
    message = str(find_failure(caught.value))
    assert message.startswith("bad ended with exit code 1: RuntimeError: no such model")
    assert str(tmp_path / "bad.log") in message


async def test_a_program_that_does_not_exist_is_a_failure(tmp_path: Path, leash: Leash) -> None:
    part = Part(name="gone", kind=Kind.NATS, command=("/does/not/exist",), log=tmp_path / "gone.log")
    with pytest.raises(ExceptionGroup) as caught:
        async with supervise(say=print, leash=leash) as supervisor:
            await supervisor.start(part)
    assert "gone cannot be started" in str(find_failure(caught.value))


async def killed(supervisor: Supervisor, name: str) -> int:
    """Kill a part and wait for its successor; gives the successor's process id."""
    pid = supervisor.process_ids[name]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: supervisor.process_ids.get(name, pid) != pid)
    return supervisor.process_ids[name]


async def test_a_killed_part_is_started_again_and_said(tmp_path: Path, leash: Leash) -> None:
    lines: list[str] = []
    async with supervise(say=lines.append, leash=leash, policy=RestartPolicy(first_pause_s=0.01)) as supervisor:
        await supervisor.start(python_part(tmp_path, "worker 1", SLEEP))
        supervisor.settle()
        successor = await killed(supervisor, "worker 1")
        assert is_alive(successor)
    assert not is_alive(successor)
    assert lines == [f"worker 1 was killed by signal 9; starting it again (log: {tmp_path / 'worker 1.log'})"]


async def test_the_last_worker_may_not_stay_away(tmp_path: Path, leash: Leash) -> None:
    lines: list[str] = []
    code = "import time; time.sleep(0.3)"  # long enough to be settled first
    policy = RestartPolicy(most=1, first_pause_s=0.01)
    with pytest.raises(ExceptionGroup) as caught:
        async with supervise(say=lines.append, leash=leash, policy=policy) as supervisor:
            await supervisor.start(python_part(tmp_path, "worker 1", code))
            await supervisor.start(python_part(tmp_path, "worker 2", code))
            supervisor.settle()
            await asyncio.sleep(20)
    assert "again and again" in str(find_failure(caught.value))
    assert sum("stays away" in line for line in lines) == 1


async def test_start_waits_for_the_port(tmp_path: Path, leash: Leash) -> None:
    port = free_port()
    code = f"""
        import socket, time
        time.sleep(0.2)
        server = socket.create_server(("127.0.0.1", {port}))
        time.sleep(60)
    """
    async with supervise(say=print, leash=leash) as supervisor:
        await supervisor.start(python_part(tmp_path, "server", code, Kind.GATEWAY, port))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()


async def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
        import asyncio, os, sys
        from pathlib import Path
        from molink.leash import Leash
        from molink.parts import Kind, Part
        from molink.supervisor import supervise

        async def main():
          with Leash() as leash:
            async with supervise(say=print, leash=leash) as supervisor:
                command = (sys.executable, "-I", "-S", "-c", {SLEEP!r})
                part = Part(name="a", kind=Kind.WORKER, command=command, log=Path({str(note)!r} + ".log"))
                await supervisor.start(part)
                Path({str(note)!r} + ".part").write_text(str(supervisor.process_ids["a"]))
                os.rename({str(note)!r} + ".part", {str(note)!r})
                await asyncio.sleep(60)

        asyncio.run(main())
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])  # noqa: ASYNC220  it must be killed from outside
    try:
        await until(note.exists)
        child = int(note.read_text())
        assert is_alive(child)
    finally:
        process.kill()
        process.wait()
    await until(lambda: not is_alive(child))
