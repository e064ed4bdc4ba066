"""Clients as users have them, unchanged, against one real system: `make test-clients`.

    python -m tests.clients.run                                    every client, on a system started for it, with a key
    python -m tests.clients.run --only openai-python,litellm       these
    python -m tests.clients.run --base-url http://127.0.0.1:8000   on a system that runs already
    python -m tests.clients.run --prepare                          only set their environments up

Every check is a line; a table closes. The exit code is 0 only where every check of every client passed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.clients.catalogue import ROOT, Client, chosen
from tests.clients.environments import Environments, NoEnvironment, version_of
from tests.clients.outcomes import Outcome, judged, line_of, read_outcome, table
from tests.clients.started import Server, started_server

_LAST_WORDS = 600


async def main(arguments: argparse.Namespace, clients: Sequence[Client]) -> bool:
    """Whether every check passed."""
    environments = Environments(arguments.cache.resolve())
    commands: dict[Client, tuple[str, ...]] = {}
    outcomes: list[Outcome] = []
    for client in clients:
        try:
            commands[client] = environments.prepare(client)
        except NoEnvironment as missing:
            outcomes.append(Outcome(client=client.name, check="environment", ok=False, detail=str(missing)))
            print(line_of(outcomes[-1]), flush=True)
    if commands and not arguments.prepare:
        async with _server(arguments) as server:
            for client, command in commands.items():
                outcomes += await _run_client(client, command, server, arguments)
    print("\n" + table(outcomes, {client.name: version_of(client) for client in clients}))
    return all(outcome.ok for outcome in outcomes)


@contextlib.asynccontextmanager
async def _server(arguments: argparse.Namespace) -> AsyncIterator[Server]:
    """The server to try: the one that was named, or one started for this run."""
    if arguments.base_url is not None:
        yield Server(url=arguments.base_url.rstrip("/").removesuffix("/v1"), api_key=arguments.api_key)
        return
    print("starting a system", flush=True)
    async with started_server(arguments.model) as server:
        yield server


async def _run_client(
    client: Client, command: tuple[str, ...], server: Server, arguments: argparse.Namespace
) -> list[Outcome]:
    """What its program told, line by line as it comes; it is ended when it takes too long."""
    print(f"{client.name} {version_of(client)}", flush=True)
    outcomes: list[Outcome] = []
    process = await asyncio.create_subprocess_exec(
        *command,
        *arguments.check,
        cwd=ROOT,
        env=_environment(server, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = ""
    try:
        async with asyncio.timeout(client.limit_s):
            async for raw in process.stdout:
                line = raw.decode(errors="replace")
                outcome = read_outcome(line)
                if outcome is None:
                    said = (said + line)[-_LAST_WORDS:]
                else:
                    outcomes.append(outcome)
                    print(line_of(outcome), flush=True)
            await process.wait()
    except TimeoutError:
        said = f"it took longer than {client.limit_s:g} s and was ended; {said}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        exit_code = await process.wait()
    for outcome in (told := judged(client.name, outcomes, exit_code, said.strip()))[len(outcomes) :]:
        print(line_of(outcome), flush=True)
    return told


def _environment(server: Server, arguments: argparse.Namespace) -> dict[str, str]:
    """Ours without what would lead a client elsewhere, and where the server is."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "PYTHON"))}
    return inherited | {
        "CLIENT_BASE_URL": f"{server.url}/v1",
        "CLIENT_MODEL": arguments.served_name,
        "CLIENT_API_KEY": server.api_key,
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONUNBUFFERED": "1",
        # LiteLLM asks the Internet for prices when it is imported
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


def _parsed(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, tuple[Client, ...]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="clients, with commas between")
    parser.add_argument("--check", action="append", default=[], help="only this check of a client; may be repeated")
    parser.add_argument("--base-url", help="a system that runs already; else one is started")
    parser.add_argument("--model", default="demo", help="what the started system serves")
    parser.add_argument("--served-name", default="demo", help="the model's name in requests")
    parser.add_argument("--api-key", default="unused", help="for a system that runs already and wants one")
    parser.add_argument("--cache", type=Path, default=ROOT / ".clients", help="folder for the environments")
    parser.add_argument("--prepare", action="store_true", help="set the environments up, and no more")
    arguments = parser.parse_args(words)
    try:
        clients = chosen([name for name in arguments.only.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    return arguments, clients


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main(*_parsed())) else 1)
