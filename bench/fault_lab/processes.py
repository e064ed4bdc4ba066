"""Starts parts, kills, stops and wakes them. None of them outlives the block."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Self

from molink.embedded import is_listening
from molink.leash import Leash, kill_group
from molink.parts import Part, exit_reason
from molink.supervisor import words_in
from molink_common.errors import MolinkError

_LISTEN_TIMEOUT_S = 30.0
_LOOK_AGAIN_S = 0.02


class DidNotRun(MolinkError):
    """A part ended or does not listen in time. Carries its last words."""


class Processes:
    """Parts by name. Also if this process is killed, they die with it."""

    def __init__(self, leash: Leash) -> None:
        self._leash = leash
        self._parts: dict[str, Part] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._away: set[str] = set()
        self.started_at_s: dict[str, float] = {}
        """Seconds since 1970, of the last start."""

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Self]:
        """Nothing runs yet; at the end nothing runs any more."""
        with Leash() as leash:
            processes = cls(leash)
            try:
                yield processes
            finally:
                for name in list(processes._processes):
                    processes._end(name)

    def part(self, name: str) -> Part:
        """What was started under this name."""
        return self._parts[name]

    def is_running(self, name: str) -> bool:
        """Whether its process has not ended."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def start(self, part: Part) -> None:
        """Start a part for the first time, or again."""
        assert not self.is_running(part.name), f"{part.name} runs"
        self._parts[part.name] = part
        self._away.discard(part.name)
        with part.log.open("ab") as log:
            process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **part.environment},
                # Ctrl-C at the terminal must reach us alone
                start_new_session=True,
            )
        self._leash.put_on(process.pid)
        self.started_at_s[part.name] = time.time()
        self._processes[part.name] = process

    async def until_listening(self, name: str) -> None:
        """Return once a part accepts connections.

        Raises:
            DidNotRun: it ended, or does not within 30 s.
        """
        part = self._parts[name]
        assert part.port is not None, f"{name} listens"
        deadline_s = asyncio.get_running_loop().time() + _LISTEN_TIMEOUT_S
        while not is_listening(part.port):
            if not self.is_running(name) or asyncio.get_running_loop().time() > deadline_s:
                raise DidNotRun(f"{name} does not listen: {words_in(part.log)} (log: {part.log})")
            await asyncio.sleep(_LOOK_AGAIN_S)  # a port tells nobody that it opened

    def kill(self, name: str) -> None:
        """SIGKILL, and no other word. It stays away until it is started."""
        self._away.add(name)
        self._end(name)

    async def leave(self, name: str, timeout_s: float) -> bool:
        """SIGTERM, and wait for its end. It stays away until it is started. False: it did not end in time."""
        self._away.add(name)
        process = self._processes[name]
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, timeout_s)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        self._end(name)
        return ended

    def _end(self, name: str) -> None:
        process = self._processes[name]
        kill_group(process.pid)
        process.wait()
        self._leash.take_off(process.pid)

    def stop(self, name: str) -> None:
        """SIGSTOP: it is there, and does nothing."""
        os.killpg(self._processes[name].pid, signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """SIGCONT."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._processes[name].pid, signal.SIGCONT)

    def restart_ended(self) -> list[str]:
        """Start again what ended though nobody killed it; gives a sentence for each."""
        told = []
        for name, process in list(self._processes.items()):
            code = process.poll()
            if code is not None and name not in self._away:
                self._end(name)
                told.append(f"{name} {exit_reason(code)}: {words_in(self._parts[name].log)}")
                self.start(self._parts[name])
        return told
