"""``python -m molink_gateway``: one gateway."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from molink_common.service import run_service
from molink_gateway.listening import listen
from molink_gateway.settings import GatewaySettings


def keep_torch_out() -> None:
    """Make transformers believe that there is no torch, where it is installed for a worker of the same machine.

    A tokenizer does not need it, and importing it costs seconds and 250 MB. Only for a process that is nothing but
    a gateway.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


async def _serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    opened = listen(settings.host, settings.port)
    from molink_gateway.server import serve  # noqa: PLC0415  imports transformers: slow, and must not find torch

    await serve(settings, stop, opened)


def main(arguments: Sequence[str]) -> int:
    """Run a gateway until it is told to stop; gives the exit code."""
    keep_torch_out()
    return run_service("gateway", GatewaySettings, _serve, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
