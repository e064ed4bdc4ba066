"""`molink keys`: add, list and revoke API keys.

The secret is made here and shown once; the scheduler is told its hash. So nothing but the terminal ever has it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from molink_common import subjects
from molink_common.bus import Bus, BusSettings, open_bus
from molink_common.errors import MolinkError, NobodyListens, RequestTimeout
from molink_common.messages import (
    AddKey,
    ApiKey,
    AskKeys,
    Done,
    Failed,
    KeyLimits,
    Keys,
    M,
    Message,
    RevokeKey,
    hash_of_secret,
    new_secret,
)

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 5.0

app = typer.Typer(
    help="API keys: who may use the gateways, and how much. Talks to the scheduler over NATS.", no_args_is_help=True
)

NatsUrl = Annotated[str, typer.Option(envvar="MOLINK_NATS_URL", help="Address of NATS; `molink up` prints its own.")]
NatsUser = Annotated[str | None, typer.Option(envvar="MOLINK_NATS_USER", help="User for NATS.")]
NatsPassword = Annotated[str | None, typer.Option(envvar="MOLINK_NATS_PASSWORD", help="Password for NATS.")]
NatsCredentials = Annotated[
    str | None, typer.Option(envvar="MOLINK_NATS_CREDENTIALS_FILE", help="NATS .creds file (JWT and nkey).")
]
Name = Annotated[str, typer.Argument(help="Whose key it is: letters, digits, spaces and ._@+-")]

_DEFAULT_URL = "nats://127.0.0.1:4222"


@app.command()
def add(
    name: Name,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Default: no limit.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Answers at the same time. Default: no limit.")] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and answers, each day in UTC. Default: no limit.")
    ] = None,
    nats_url: NatsUrl = _DEFAULT_URL,
    nats_user: NatsUser = None,
    nats_password: NatsPassword = None,
    nats_credentials_file: NatsCredentials = None,
) -> None:
    """Add a key and print its secret: on standard output, alone, and never again."""
    settings = _bus_settings(nats_url, nats_user, nats_password, nats_credentials_file)
    secret = new_secret()
    try:
        key = ApiKey(
            id=f"key-{secrets.token_hex(6)}",
            name=name,
            secret_sha256=hash_of_secret(secret),
            created_s=int(time.time()),
            limits=KeyLimits(
                requests_per_minute=requests_per_minute, concurrent=concurrent, tokens_per_day=tokens_per_day
            ),
        )
    except ValidationError as error:
        raise MolinkError(
            f"{name!r} is no name for a key: 1 to 64 letters, digits, spaces and ._@+-, a letter or digit first"
        ) from error
    _run(settings, lambda bus: _order(bus, AddKey(key=key)))
    print(f"{key.name} may use the gateways with this key ({key.id}). It is shown only now:", file=sys.stderr)
    print(secret)


@app.command(name="list")
def list_keys(
    nats_url: NatsUrl = _DEFAULT_URL,
    nats_user: NatsUser = None,
    nats_password: NatsPassword = None,
    nats_credentials_file: NatsCredentials = None,
) -> None:
    """Show all keys with their limits and the tokens used today; never their secrets."""
    keys = _run(_bus_settings(nats_url, nats_user, nats_password, nats_credentials_file), _table)
    show(keys, Console())


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id or name.")],
    nats_url: NatsUrl = _DEFAULT_URL,
    nats_user: NatsUser = None,
    nats_password: NatsPassword = None,
    nats_credentials_file: NatsCredentials = None,
) -> None:
    """End a key, and what runs with it, at once."""

    async def find_and_revoke(bus: Bus) -> ApiKey:
        found = chosen(await _table(bus), key)
        await _order(bus, RevokeKey(key=found.id))
        return found

    revoked = _run(_bus_settings(nats_url, nats_user, nats_password, nats_credentials_file), find_and_revoke)
    print(f"revoked {revoked.name} ({revoked.id})")


def chosen(keys: Keys, name: str) -> ApiKey:
    """The valid key with this id or name.

    Raises:
        MolinkError: there is none.
    """
    valid = [one for one in keys.keys if one.revoked_s is None]
    # an id before a name that happens to look like one
    for one in sorted(valid, key=lambda one: one.id != name):
        if name in (one.id, one.name):
            return one
    if any(name in (one.id, one.name) for one in keys.keys):
        raise MolinkError(f"{name} is revoked already")
    names = ", ".join(one.name for one in valid) or "none"
    raise MolinkError(f"there is no key with the id or name {name!r}; valid keys: {names}")


def show(keys: Keys, console: Console) -> None:
    """Print the table."""
    if not keys.keys:
        console.print("no keys yet; `molink keys add NAME` adds one", highlight=False)
        return
    table = Table(expand=False)
    for column in ("name", "id", "added", "requests a minute", "at a time", "tokens a day", "tokens today", "state"):
        table.add_column(column, overflow="fold")
    for key in sorted(keys.keys, key=lambda one: one.created_s):
        limits = key.limits
        table.add_row(
            key.name,
            key.id,
            _day(key.created_s),
            *("no limit" if limit is None else str(limit) for limit in (
                limits.requests_per_minute, limits.concurrent, limits.tokens_per_day
            )),
            str(keys.tokens_today.get(key.id, 0)),
            "valid" if key.revoked_s is None else f"revoked {_day(key.revoked_s)}",
        )  # fmt: skip
    console.print(table)


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


async def _table(bus: Bus) -> Keys:
    return await _ask(bus, subjects.KEYS, AskKeys(), Keys)


async def _order(bus: Bus, order: AddKey | RevokeKey) -> None:
    answer = await _ask(bus, subjects.CHANGE_KEYS, order, Done, Failed)
    if isinstance(answer, Failed):
        raise MolinkError(answer.message)


async def _ask(bus: Bus, subject: str, question: Message, *expected: type[M]) -> M:
    try:
        return await bus.ask(subject, question, *expected, timeout_s=_ANSWER_TIMEOUT_S)
    except NobodyListens as error:
        raise MolinkError("no scheduler listens on this NATS; start one, or set --nats-url") from error
    except RequestTimeout as error:
        raise MolinkError(
            f"the scheduler has not confirmed it within {_ANSWER_TIMEOUT_S:g} s: `molink keys list` shows whether it "
            "is so. Either its Redis does not answer, or this NATS user may not change keys"
        ) from error


def _bus_settings(url: str, user: str | None, password: str | None, credentials_file: str | None) -> BusSettings:
    return BusSettings(
        url=url,
        connect_timeout_s=_CONNECT_TIMEOUT_S,
        user=user,
        password=password,
        credentials_file=credentials_file,
    )


def _run(settings: BusSettings, work: Callable[[Bus], Awaitable[T]]) -> T:
    # what the bus says of its connection is told by the error
    logging.getLogger().addHandler(logging.NullHandler())

    async def main() -> T:
        async with open_bus(settings, name="molink-keys") as bus:
            return await work(bus)

    return asyncio.run(main())
