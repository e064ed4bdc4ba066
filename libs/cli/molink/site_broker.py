"""Runs one site's nats-server: starts it, follows what it says, starts it again when it ends, stops it.

    await run_broker(plan, folder=..., say=print, ready=lambda: None, stop=event)

It does not need the others: while the hub or the other sites are away, it serves its own clients and waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from molink.embedded import find_nats_server, nats_server_command
from molink.leash import Leash, kill_group
from molink.nats_config import BrokerPlan, render, site_config
from molink.nats_log import LINK_SETTLES_S, Kind, LinkStory, Notice, notice_of
from molink.parts import RestartPolicy, exit_reason, restart_pause_s
from molink_common.errors import MolinkError

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_LONGEST_LINE_BYTES = 1 << 20

Say = Callable[[str], None]


class BrokerFailed(MolinkError):
    """A site's broker cannot run. The message names the setting and the fix."""


async def run_broker(
    plan: BrokerPlan, *, folder: Path, say: Say, ready: Callable[[], None], stop: asyncio.Event
) -> None:
    """Serve until `stop`. `ready` is called once, when clients are served; `folder` takes the configuration.

    A server that ends after it was ready is started again, on the same ports, as `RestartPolicy` allows. When
    this process dies, whichever way, the server dies with it.

    Raises:
        BrokerFailed: it does not start, or ends again and again.
        ServerNotFound: there is no nats-server.
    """
    find_nats_server()
    _refuse_taken_ports(plan)
    command = nats_server_command(folder, render(site_config(plan)))
    policy = RestartPolicy()
    ended_at_s: list[float] = []
    loop = asyncio.get_running_loop()
    with Leash() as leash:
        server = _Server(plan, command, leash, say)
        if not await server.run(ready, stop):
            return
        while not stop.is_set():
            ended_at_s.append(loop.time())
            pause_s = restart_pause_s(policy, ended_at_s, loop.time())
            if pause_s is None:
                raise BrokerFailed(f"nats-server ended {len(ended_at_s)} times: {server.last_words}")
            say(f"nats-server {server.last_words}; starting it again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)
            if not stop.is_set():
                await server.run(lambda: None, stop)


class _Server:
    """One nats-server process after the other."""

    def __init__(self, plan: BrokerPlan, command: Sequence[str], leash: Leash, say: Say) -> None:
        self._plan = plan
        self._command = command
        self._leash = leash
        self._say = say
        self._was_ready = False
        self.last_words = ""

    async def run(self, ready: Callable[[], None], stop: asyncio.Event) -> bool:
        """Start it and stay until it ends or until `stop`; gives whether it ended by itself.

        Raises:
            BrokerFailed: the very first one ends before it is ready, or is not ready in time.
        """
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE_BYTES,
            # Ctrl-C at the terminal must reach us alone: workers may still need it to say goodbye
            start_new_session=True,
        )
        self._leash.put_on(process.pid)
        became_ready = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(process, became_ready, stop))
                stopping = group.create_task(self._stop_on(stop, process))
                if await self._until_ready(process, became_ready) and not self._was_ready:
                    self._was_ready = True
                    ready()
                return_code = await process.wait()
                stopping.cancel()
        finally:
            kill_group(process.pid)
            await process.wait()
            self._leash.take_off(process.pid)
        self.last_words = self.last_words or exit_reason(return_code)
        if not self._was_ready and not stop.is_set():
            raise BrokerFailed(f"nats-server did not start: {self.last_words}")
        return not stop.is_set()

    async def _until_ready(self, process: asyncio.subprocess.Process, became_ready: asyncio.Event) -> bool:
        """False when it ended instead."""
        ended = asyncio.ensure_future(process.wait())
        said = asyncio.ensure_future(became_ready.wait())
        try:
            done, _ = await asyncio.wait({ended, said}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            said.cancel()
        if not done:
            raise BrokerFailed(f"nats-server is not ready after {_START_TIMEOUT_S:g} s: {self.last_words}")
        return became_ready.is_set()

    async def _stop_on(self, stop: asyncio.Event, process: asyncio.subprocess.Process) -> None:
        await stop.wait()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        kill_group(process.pid)

    async def _follow(
        self, process: asyncio.subprocess.Process, became_ready: asyncio.Event, stop: asyncio.Event
    ) -> None:
        """Tell what its log says of the links, until it ends."""
        assert process.stderr is not None
        story = LinkStory(self._plan)
        settling: dict[str, asyncio.TimerHandle] = {}
        self.last_words = ""
        try:
            async for raw in process.stderr:
                notice = notice_of(raw.decode(errors="replace"), self._plan)
                if notice is not None and notice.kind is Kind.READY:
                    became_ready.set()
                elif notice is not None and not stop.is_set():  # links that end with us are no news
                    self._tell(notice, story, settling)
        finally:
            for handle in settling.values():
                handle.cancel()

    def _tell(self, notice: Notice, story: LinkStory, settling: dict[str, asyncio.TimerHandle]) -> None:
        sentence: str | None = None
        if notice.kind is Kind.UP:

            def settled() -> None:
                del settling[notice.link]
                self._say(story.settled(notice.link, notice.peer))

            settling[notice.link] = asyncio.get_running_loop().call_later(LINK_SETTLES_S, settled)
        elif notice.kind is Kind.DOWN:
            if (handle := settling.pop(notice.link, None)) is not None:
                handle.cancel()
            sentence = story.closed(notice.link, notice.text)
        else:
            self.last_words = notice.text
            sentence = story.problem(notice.text)
        if sentence is not None:
            self._say(sentence)


def _refuse_taken_ports(plan: BrokerPlan) -> None:
    for flag, (host, port) in plan.doors.items():
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                # as servers do: a port whose last connections are still fading away is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            why = error.strerror or str(error)
            raise BrokerFailed(f"port {port} on {host} cannot be used ({why}); choose another {flag}") from error
