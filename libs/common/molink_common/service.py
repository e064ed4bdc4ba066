"""How a service starts and stops: settings, logs, event loop, signals, exit codes.

Exit codes: 0 after SIGINT or SIGTERM, 2 for wrong settings, 1 for anything that stopped it from serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from molink_common.errors import MolinkError, SettingsError
from molink_common.logs import get_logger, set_up_logs
from molink_common.settings import ServiceSettings, read_settings

log = get_logger("service")

S = TypeVar("S", bound=ServiceSettings)


def run_service(
    name: str,
    settings_kind: type[S],
    serve: Callable[[S, asyncio.Event], Awaitable[None]],
    arguments: Sequence[str],
) -> int:
    """Read the settings and run `serve(settings, stop)` until it returns; gives the exit code.

    `stop` is set by SIGINT and SIGTERM; `serve` then finishes what it must and returns.
    """
    try:
        settings = read_settings(settings_kind, arguments, os.environ, program=f"molink {name}")
    except SettingsError as error:
        print(f"molink {name}: {error}", file=sys.stderr)
        return 2
    set_up_logs(service=name, level=settings.log_level, style=settings.log_style)
    try:
        run(_until_signalled(settings, serve))
    except MolinkError as error:
        log.error("service stopped", problem=str(error))
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def run(main: Awaitable[None]) -> None:
    """`asyncio.run` on uvloop where it exists: NATS round trips take half the time."""

    async def start() -> None:
        await main

    try:
        import uvloop  # noqa: PLC0415  not on Windows
    except ImportError:
        asyncio.run(start())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(start())


async def _until_signalled(settings: S, serve: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no add_signal_handler; Ctrl-C arrives there as KeyboardInterrupt
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)
