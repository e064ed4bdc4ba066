"""Runs the parts: starts them, starts them again when they end, stops them in order.

    with Leash() as leash:
        async with supervise(say=print, leash=leash) as supervisor:
            await supervisor.start(part)
            supervisor.settle()          # from here on a part that ends is started again
            ...
        # every process has ended

Until `settle`, a part that ends is an error (`PartFailed`): something is wrong with how it was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from molink.leash import Leash, kill_group
from molink.parts import Kind, Part, RestartPolicy, exit_reason, in_stop_order, last_words, restart_pause_s
from molink_common.errors import MolinkError

_LISTEN_TIMEOUT_S = 15.0
_LISTEN_PROBE_PAUSE_S = 0.02
_LAST_WORDS_BYTES = 16 * 1024


class PartFailed(MolinkError):
    """A part could not be started, or ended too often. Carries its last words and its log's path."""

    def __init__(self, part: Part, what: str) -> None:
        super().__init__(f"{part.name} {what}: {words_in(part.log)} (log: {part.log})")
        self.part = part


def words_in(log: Path) -> str:
    """The line of a log that best explains why its process ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_WORDS_BYTES))
            return last_words(file.read().decode(errors="replace"))
    except OSError as error:
        return f"its log cannot be read: {error}"


@dataclass(slots=True)
class _Running:
    part: Part
    process: asyncio.subprocess.Process


class Supervisor:
    """The parts that run now. Made by `supervise`."""

    def __init__(
        self, *, group: asyncio.TaskGroup, leash: Leash, say: Callable[[str], None], policy: RestartPolicy
    ) -> None:
        self._group = group
        self._leash = leash
        self._say = say
        self._policy = policy
        self._running: dict[str, _Running] = {}
        self._workers: set[str] = set()
        self._keepers: set[asyncio.Task[None]] = set()
        self._settled = False

    @property
    def process_ids(self) -> dict[str, int]:
        """By part name, of those that run now."""
        return {name: running.process.pid for name, running in self._running.items()}

    async def start(self, part: Part) -> None:
        """Start a part and keep it running; returns once it listens on its port, if it has one.

        Raises:
            PartFailed: it cannot be executed, or does not listen in time.
        """
        process = await self._spawn(part)
        if part.kind is Kind.WORKER:
            self._workers.add(part.name)
        self._keepers.add(self._group.create_task(self._keep(part, process), name=f"keep {part.name}"))
        await self._until_listening(part, process)

    def settle(self) -> None:
        """The system is up: from now on a part that ends is started again."""
        self._settled = True

    async def _spawn(self, part: Part) -> asyncio.subprocess.Process:
        with part.log.open("ab") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *part.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **part.environment},
                    # Ctrl-C at the terminal must reach us alone: the parts are stopped in order
                    start_new_session=True,
                )
            except OSError as error:
                raise PartFailed(part, f"cannot be started ({error})") from error
        self._leash.put_on(process.pid)
        self._running[part.name] = _Running(part, process)
        return process

    async def _keep(self, part: Part, process: asyncio.subprocess.Process) -> None:
        loop = asyncio.get_running_loop()
        ended_at_s: list[float] = []
        while True:
            return_code = await process.wait()
            kill_group(process.pid)  # what it started must not outlive it
            self._forget(part, process)
            if not self._settled:
                raise PartFailed(part, exit_reason(return_code))
            ended_at_s.append(loop.time())
            pause_s = restart_pause_s(self._policy, ended_at_s, loop.time())
            if pause_s is None:
                self._give_up(part, return_code)
                return
            self._say(f"{part.name} {exit_reason(return_code)}; starting it again (log: {part.log})")
            await asyncio.sleep(pause_s)
            process = await self._spawn(part)

    def _give_up(self, part: Part, return_code: int) -> None:
        """A worker's loss can be borne while there are others; nothing else can."""
        self._workers.discard(part.name)
        if part.kind is not Kind.WORKER or not self._workers:
            raise PartFailed(part, f"{exit_reason(return_code)}, again and again")
        self._say(
            f"{part.name} {exit_reason(return_code)} too often and stays away: {words_in(part.log)} (log: {part.log})"
        )

    def _forget(self, part: Part, process: asyncio.subprocess.Process) -> None:
        self._leash.take_off(process.pid)
        running = self._running.get(part.name)
        if running is not None and running.process is process:
            del self._running[part.name]

    async def _until_listening(self, part: Part, process: asyncio.subprocess.Process) -> None:
        if part.port is None:
            return
        try:
            async with asyncio.timeout(_LISTEN_TIMEOUT_S):
                # a port tells nobody that it opened: it must be tried
                while not await _accepts(part.port):  # noqa: ASYNC110
                    await asyncio.sleep(_LISTEN_PROBE_PAUSE_S)
        except TimeoutError:
            raise PartFailed(part, f"does not listen on port {part.port} after {_LISTEN_TIMEOUT_S:g} s") from None

    async def stop(self) -> None:
        """Stop every part, kind by kind; a part that takes too long is killed."""
        for keeper in self._keepers:
            keeper.cancel()
        # a start that was under way is undone by its cancellation, so nothing new appears below
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for group in in_stop_order([running.part for running in self._running.values()]):
            await asyncio.gather(*(self._stop_one(self._running[part.name]) for part in group))

    async def _stop_one(self, running: _Running) -> None:
        process = running.process
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(running.part.stop_timeout_s):
                await process.wait()
        except TimeoutError:
            pass
        finally:
            kill_group(process.pid)
        await process.wait()
        self._forget(running.part, process)

    def kill_all(self) -> None:
        """Kill every part at once: somebody lost patience."""
        for running in self._running.values():
            kill_group(running.process.pid)


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


@contextlib.asynccontextmanager
async def supervise(
    *, say: Callable[[str], None], leash: Leash, policy: RestartPolicy | None = None
) -> AsyncIterator[Supervisor]:
    """A supervisor whose parts have all ended when the block is left, however it is left.

    Raises:
        ExceptionGroup: with a `PartFailed`, when a part failed while the block ran.
    """
    async with asyncio.TaskGroup() as group:
        supervisor = Supervisor(group=group, leash=leash, say=say, policy=policy or RestartPolicy())
        try:
            yield supervisor
        finally:
            await supervisor.stop()


def python_command(module: str, *arguments: str) -> tuple[str, ...]:
    """A Python module as a part's command, in the interpreter that runs now."""
    return (sys.executable, "-m", module, *arguments)
