"""`molink worker --site NAME --hub URL`: a worker at its site's broker, which is started if none runs yet.

The broker is a process of its own. Workers of one site on one machine share it; it ends with the last of them.
User and password are the hub's, and the local broker asks its clients for the same.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molink.broker import credentials_of
from molink.embedded import find_nats_server, free_port
from molink.nats_config import LEAF_PORT, BrokerPlan, Credentials, peers
from molink.site_broker import BrokerFailed
from molink.site_folder import RunningBroker, counted_as_user, running_broker, site_folder, starting
from molink_common.errors import SettingsError

HELP = """\
  --hub                        join the pool through this site's own broker, a leaf node of the hub at this address;
                               started here if none runs, and used instead of --nats-url. Needs --site; see
                               `molink broker` for one that several machines share (default None; MOLINK_HUB)\
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChoice:
    """Which site's broker a worker wants."""

    site: str
    hub: tuple[str, ...]
    credentials: Credentials | None = None


def site_choice(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[SiteChoice | None, list[str]]:
    """The site's broker that is asked for, if any, and the worker's own arguments: all but ``--hub``.

    Raises:
        SettingsError: what is given does not go together.
    """
    rest: list[str] = []
    hub = environment.get("MOLINK_HUB") or None
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--hub":
            if not waiting or waiting[0].startswith("--"):
                raise SettingsError("--hub needs a value: nats://other-machine:7422")
            hub = waiting.pop(0)
        elif argument.startswith("--hub="):
            hub = argument.partition("=")[2]
        else:
            rest.append(argument)
    if hub is None:
        return None, rest
    if _value(rest, {}, "--nats-url") is not None:
        raise SettingsError("--hub and --nats-url exclude each other: with --hub the worker talks to its site's broker")
    if _value(rest, environment, "--nats-credentials-file") is not None:
        raise SettingsError("--hub takes --nats-user and --nats-password, no --nats-credentials-file")
    site = _value(rest, environment, "--site")
    if site is None:
        raise SettingsError("--hub needs --site NAME: machines that share a name should have fast links between them")
    choice = SiteChoice(
        site=site,
        hub=peers(hub, flag="--hub", default_port=LEAF_PORT),
        credentials=credentials_of(
            _value(rest, environment, "--nats-user"), _value(rest, environment, "--nats-password")
        ),
    )
    plan_of(choice, port=1)  # whatever else is wrong is said before anything is started
    return choice, rest


def _value(arguments: Sequence[str], environment: Mapping[str, str], flag: str) -> str | None:
    """A setting of the worker, as `read_settings` finds it: the last flag, else the variable."""
    found = environment.get("MOLINK_" + flag[2:].replace("-", "_").upper()) or None
    for at, argument in enumerate(arguments):
        if argument == flag and at + 1 < len(arguments):
            found = arguments[at + 1]
        elif argument.startswith(flag + "="):
            found = argument.partition("=")[2]
    return found


def plan_of(choice: SiteChoice, *, port: int) -> BrokerPlan:
    """The broker that serves a choice.

    Raises:
        SettingsError: there can be none.
    """
    return BrokerPlan(
        site=choice.site, server_name=choice.site, port=port, hub=choice.hub, credentials=choice.credentials
    )


@contextlib.contextmanager
def use_site_broker(choice: SiteChoice, cache: Path) -> Iterator[str]:
    """The URL of the site's broker on this machine, which runs at least as long as the block.

    Raises:
        BrokerFailed: it does not start; the message says why.
        SettingsError: one runs, but joins another hub.
    """
    find_nats_server()
    folder = site_folder(cache, choice.site)
    with counted_as_user(folder):
        with starting(folder):
            broker = running_broker(folder) or _start(choice, folder)
        wanted = plan_of(choice, port=1).joins
        if broker.joins != wanted:
            raise SettingsError(
                f"--hub: the broker of site {choice.site} on this machine (pid {broker.pid}) joins {broker.joins}, "
                f"not {wanted}; stop it, or choose another --site"
            )
        print(f"site {choice.site}: broker at {broker.url}, joins {broker.joins}", file=sys.stderr, flush=True)
        yield broker.url


def _start(choice: SiteChoice, folder: Path) -> RunningBroker:
    """A broker in the background that stays while it is used. Returns when it serves, within seconds."""
    command = [sys.executable, "-m", "molink", "broker", "--while-used", "--site", choice.site]
    command += ["--hub", ",".join(choice.hub), "--port", str(free_port())]
    environment = dict(os.environ)
    for name in ("MOLINK_NATS_USER", "MOLINK_NATS_PASSWORD"):
        environment.pop(name, None)
    if choice.credentials is not None:  # other users of this machine can read a command, but not an environment
        environment["MOLINK_NATS_USER"] = choice.credentials.user
        environment["MOLINK_NATS_PASSWORD"] = choice.credentials.password
    log = folder / "broker.log"
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  the command is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout:
        is_ready = bool(process.stdout.readline())  # ends, at the latest, with the process, which bounds its own start
    broker = running_broker(folder) if is_ready else None
    if broker is None:
        process.kill()
        process.wait()
        said = log.read_text(errors="replace").strip().splitlines()
        raise BrokerFailed(f"the broker of site {choice.site} did not start: {(said or ['it said nothing'])[-1]}")
    return broker
