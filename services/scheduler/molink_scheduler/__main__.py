"""``molink scheduler``: the service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from molink_common.bus import open_bus
from molink_common.memory import spare_what_lives
from molink_common.service import run_service
from molink_scheduler.response_shelf import keeping_responses, open_response_shelf
from molink_scheduler.settings import SchedulerSettings
from molink_scheduler.shell import serve_scheduler
from molink_scheduler.store import open_store


async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Open both doors and serve until `stop`."""
    async with (
        open_bus(settings.bus_settings(), name="scheduler") as bus,
        open_store(settings.redis_url) as store,
        open_response_shelf(settings.redis_url) as shelf,
        keeping_responses(bus, shelf),
    ):
        spare_what_lives()
        await serve_scheduler(settings, bus, store, stop)


def main(arguments: Sequence[str]) -> int:
    """Run the service; gives the exit code."""
    return run_service("scheduler", SchedulerSettings, serve, arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
