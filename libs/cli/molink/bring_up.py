"""Brings the whole system up on this machine, step by step, and keeps it up.

Whatever goes wrong on the way, and whenever it is cancelled: the parts that run are stopped in order, the lock
file is gone, and one error says what was wrong.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.markup import escape

from molink import embedded
from molink.folders import locks_folder, new_run_folder
from molink.leash import Leash
from molink.lock import Holder, hold
from molink.memory import share_for_each, show_size, weight_bytes, what_is_lacking
from molink.openai_stream import ApiError
from molink.parts import Kind, Part
from molink.plan import UpOptions, service_parts, worker_names
from molink.prepare import Device, prepare
from molink.readiness import hopeless, news, still_missing
from molink.sample import NEEDS_KEY, QUESTION, ask_sample
from molink.supervisor import Supervisor, supervise
from molink_common import __version__, messages, subjects
from molink_common.bus import Bus, BusSettings, Incoming, open_bus
from molink_common.errors import MolinkError, ProtocolError
from molink_common.folders import cache_folder
from molink_common.messages import ClusterState, Dtype, ModelCard

_CONNECT_TIMEOUT_S = 3.0
_GATEWAY_TIMEOUT_S = 30.0
_LOOK_AGAIN_S = 0.1


class DidNotComeUp(MolinkError):
    """The system is not ready in time, or never will be. The message says what is missing."""


@dataclass(slots=True)
class Progress:
    """How far it has come, for the one who handles signals."""

    supervisor: Supervisor | None = None
    was_ready: bool = False


async def bring_up(options: UpOptions, console: Console, progress: Progress) -> int:
    """Run everything until cancelled; with `exit_after_ready` until the first answer, then the result is 0.

    Raises:
        MolinkError (alone or in a group): one sentence says why it did not come up, or did not stay up.
    """
    cache = cache_folder()
    holder = Holder(pid=os.getpid(), port=options.port, url=options.url)
    with hold(locks_folder(cache), holder), Leash() as leash:
        _refuse_taken_port(options.host, options.port, "--port")
        if options.leaf_door is not None:
            _refuse_taken_port(options.leaf_door.host, options.leaf_door.port, "--leaf-port")
        _refuse_missing_servers(options)
        logs = options.log_folder or new_run_folder(cache, options.port)
        logs.mkdir(parents=True, exist_ok=True)
        console.print(
            f"MoLink {__version__}: {options.model} on {options.workers} workers (logs: {logs})", markup=False
        )
        card, device = await prepare(
            options.model, options.device, log=logs / "model.log", leash=leash, console=console
        )
        memory_bytes = _memory_for_each(options, card, device)
        _say_model(console, card, device, _dtype(options, device))
        async with supervise(say=lambda line: console.print(line, markup=False), leash=leash) as supervisor:
            progress.supervisor = supervisor
            nats_url, redis_url = await _start_servers(options, supervisor, logs, console)
            parts = service_parts(
                options, nats_url=nats_url, redis_url=redis_url, worker_memory_bytes=memory_bytes, logs=logs
            )
            for part in parts:
                await supervisor.start(part)
            await _until_ready(options, nats_url, console)
            await _until_gateway_answers(options, console)
            progress.was_ready = True
            supervisor.settle()
            can_chat = await _show_sample(options, card, console) if options.sample else True
            if not options.exit_after_ready:
                _show_use(options, card, nats_url, console, can_chat=can_chat)
                await asyncio.Event().wait()
    return 0


def _refuse_taken_port(host: str, port: int, flag: str) -> None:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as probe:
            # as servers do: a port whose last connections are still fading away is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise DidNotComeUp(
            f"port {port} on {host} cannot be used ({error.strerror or error}); choose another {flag}"
        ) from error


def _refuse_missing_servers(options: UpOptions) -> None:
    """Before minutes go into a model: our own servers must be installed, those given must answer."""
    if options.nats_url is None:
        embedded.find_nats_server()
    elif not any(_answers(address, 4222) for address in options.nats_url.split(",")):
        raise DidNotComeUp(f"no NATS server answers at --nats {options.nats_url.rpartition('@')[2]}")
    if options.redis_url is None:
        embedded.find_redis_server()
    elif not _answers(options.redis_url, 6379):
        raise DidNotComeUp(f"no Redis server answers at --redis {options.redis_url.rpartition('@')[2]}")


def _answers(url: str, default_port: int) -> bool:
    try:
        parts = urlsplit(url.strip() if "://" in url else f"//{url.strip()}")
        with socket.create_connection((parts.hostname or "", parts.port or default_port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def _dtype(options: UpOptions, device: Device) -> Dtype:
    return device.native_dtypes[0] if options.dtype == "auto" else Dtype(options.dtype)


def _memory_for_each(options: UpOptions, card: ModelCard, device: Device) -> int:
    """What each worker may use.

    Raises:
        DidNotComeUp: the weights alone do not fit.
    """
    each = options.memory_bytes or share_for_each(device.memory_bytes, options.workers)
    lacking = what_is_lacking(card, _dtype(options, device), per_worker=each, workers=options.workers)
    if lacking is not None:
        raise DidNotComeUp(lacking)
    return each


async def _start_servers(options: UpOptions, supervisor: Supervisor, logs: Path, console: Console) -> tuple[str, str]:
    """The addresses of NATS and Redis, our own or those given."""
    nats_url, redis_url = options.nats_url, options.redis_url
    if nats_url is None:
        port = embedded.free_port()
        command = embedded.nats_command(logs, port, options.leaf_door)
        await supervisor.start(Part(name="nats", kind=Kind.NATS, command=command, log=logs / "nats.log", port=port))
        nats_url = f"nats://127.0.0.1:{port}"
        _say_part(console, "nats", f"port {port}")
        if options.leaf_door is not None:
            _say_part(console, "sites", f"port {options.leaf_door.port} (molink worker --site NAME --hub …)")
    if redis_url is None:
        port = embedded.free_port()
        command = embedded.redis_command(logs, port)
        await supervisor.start(Part(name="redis", kind=Kind.REDIS, command=command, log=logs / "redis.log", port=port))
        redis_url = f"redis://127.0.0.1:{port}/0"
        _say_part(console, "redis", f"port {port}")
    return nats_url, redis_url


async def _until_ready(options: UpOptions, nats_url: str, console: Console) -> None:
    """Follow the scheduler's state and say what changes, until a request can be answered.

    Raises:
        DidNotComeUp: it never will be, or not within `ready_timeout_s`.
    """
    names = worker_names(options)
    last: ClusterState | None = None
    try:
        async with (
            asyncio.timeout(options.ready_timeout_s),
            open_bus(BusSettings(url=nats_url, connect_timeout_s=10), name="molink-up") as bus,
        ):
            states = await _follow_states(bus)
            with console.status("waiting for the scheduler") as spinner:
                while last is None or not last.ready:
                    state = await states.get()
                    if last is None:
                        _say_part(console, "scheduler", "runs")
                    for worker, line in news(last, state, names):
                        _say_part(console, worker, line)
                    last = state
                    spinner.update(f"waiting: {escape(still_missing(last, names))}")
                    if (reason := hopeless(last, names)) is not None:
                        raise DidNotComeUp(reason)
    except TimeoutError:
        missing = still_missing(last, names)
        raise DidNotComeUp(f"not ready after {options.ready_timeout_s:g} s: {missing}") from None


async def _follow_states(bus: Bus) -> asyncio.Queue[ClusterState]:
    """A queue that holds the newest state of the scheduler, and nothing older."""
    states: asyncio.Queue[ClusterState] = asyncio.Queue(maxsize=1)

    async def take(incoming: Incoming) -> None:
        try:
            state = messages.decode(incoming.data, ClusterState)
        except ProtocolError:
            return  # a scheduler of another version, on a server that is not ours
        if states.full():
            states.get_nowait()
        states.put_nowait(state)

    await bus.subscribe(subjects.STATE, take)
    return states


async def _until_gateway_answers(options: UpOptions, console: Console) -> None:
    """Wait until the gateway says that it can answer: it hears of the pipeline a moment later.

    Raises:
        DidNotComeUp: it does not within a bounded time.
    """
    last = "no answer"
    try:
        async with asyncio.timeout(_GATEWAY_TIMEOUT_S), httpx.AsyncClient(timeout=5) as client:
            while True:
                try:
                    answer = await client.get(f"{options.url}/ready")
                    if answer.status_code == httpx.codes.OK:
                        _say_part(console, "gateway", options.url)
                        return
                    last = answer.text[:200]
                except httpx.TransportError as error:
                    last = str(error) or type(error).__name__
                await asyncio.sleep(_LOOK_AGAIN_S)  # HTTP has no way to be told
    except TimeoutError:
        raise DidNotComeUp(f"the gateway is not ready after {_GATEWAY_TIMEOUT_S:g} s: {last}") from None


async def _show_sample(options: UpOptions, card: ModelCard, console: Console) -> bool:
    """Ask the first question; gives whether the model can chat."""
    console.print(f"\n> {QUESTION}", markup=False)
    try:
        answer = await ask_sample(options.url, card.name, lambda piece: console.print(piece, end="", markup=False))
    except ApiError as error:
        if error.code != NEEDS_KEY:
            raise
        console.print("  not asked: the gateway wants an API key", markup=False)
        return True
    console.print(f"\n  first token after {answer.first_piece_s:.2f} s, then {answer.pieces_per_s:.0f} tokens a second")
    return answer.is_chat


def _show_use(options: UpOptions, card: ModelCard, nats_url: str, console: Console, *, can_chat: bool) -> None:
    name = next(iter(card.aliases), card.name)
    path, field, value = "completions", "prompt", '"Once upon a time"'
    if can_chat:
        path, field, value = "chat/completions", "messages", '[{"role": "user", "content": "Hello"}]'
    body = f'{{"model": "{name}", "{field}": {value}}}'
    call = path.replace("/", ".") + f""".create(model="{name}", {field}={value})"""
    lines = [
        "",
        f"ready: {options.url}/v1   (Ctrl-C stops everything)",
        f"  curl {options.url}/v1/{path} -H 'Content-Type: application/json' -d '{body}'",
        f"  python: openai.OpenAI(base_url='{options.url}/v1', api_key='none').{call}",
    ]
    if can_chat:
        lines.append(f"  molink chat --url {options.url}/v1")
    who = "it is open to this machine until there is a key" if options.is_loopback else "nobody may ask without one"
    lines.append(f"  molink keys add NAME --nats-url {nats_url.rpartition('@')[2]}   (API keys: {who})")
    console.print("\n".join(lines), markup=False)


def _say_model(console: Console, card: ModelCard, device: Device, dtype: Dtype) -> None:
    size = show_size(weight_bytes(card, dtype))
    _say_part(console, "model", f"{card.name}: {card.num_layers} layers, {size} in {dtype}")
    _say_part(console, "device", f"{device.device} ({device.name})")


def _say_part(console: Console, name: str, what: str) -> None:
    console.print(f"  {name:10} {what}", markup=False)
