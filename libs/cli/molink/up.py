"""`molink up`: the flags, and the signals that end it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from molink.bring_up import Progress, bring_up
from molink.memory import parse_size
from molink.nats_config import Credentials, LeafDoor
from molink.plan import UpOptions
from molink.run_service import SERVICES, MissingExtra
from molink_common.errors import MolinkError
from molink_common.messages import Dtype

_INTERRUPTED = 130

Port = Annotated[int, typer.Option(min=1, max=65535, help="Port of the gateway.")]
Workers = Annotated[int, typer.Option(min=1, max=64, help="Number of stage workers.")]


def up(
    *,
    port: Port = 8000,
    host: Annotated[str, typer.Option(help="Address of the gateway; 0.0.0.0 is all.")] = "127.0.0.1",
    workers: Workers = 2,
    model: Annotated[str, typer.Option(help="demo, a folder, a GGUF file, or a hub id.")] = "demo",
    nats: Annotated[str | None, typer.Option(help="Use this NATS server instead of an own one.")] = None,
    leaf_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Let brokers of other sites join on this port, e.g. 7422.")
    ] = None,
    leaf_host: Annotated[str, typer.Option(help="Address for --leaf-port; 0.0.0.0 is all.")] = "0.0.0.0",
    leaf_user: Annotated[
        str | None, typer.Option(envvar="MOLINK_NATS_USER", help="What they must give as --nats-user.")
    ] = None,
    leaf_password: Annotated[
        str | None, typer.Option(envvar="MOLINK_NATS_PASSWORD", help="What they must give as --nats-password.")
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Use this Redis server instead of an own one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="For each worker, e.g. 2GiB. Default: a share of what is available.")
    ] = None,
    stages: Annotated[
        int | None, typer.Option(min=1, help="Stages of a pipeline. Default: one on each worker.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = 1,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OTLP/HTTP collector for traces, e.g. http://127.0.0.1:4318.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for logs. Default: in the cache folder.")] = None,
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait until all is loaded.")] = 600.0,
    exit_after_ready: Annotated[
        bool, typer.Option("--exit-after-ready", help="Stop again after the first answer (for scripts).")
    ] = False,
    sample: Annotated[bool, typer.Option(help="Ask a first question.")] = True,
) -> None:
    """Start the whole system on this machine, and stay until Ctrl-C."""
    options = UpOptions(
        host=host,
        port=port,
        workers=workers,
        stages=stages,
        model=model,
        dtype=dtype,
        device=device,
        memory_bytes=None if memory is None else parse_size(memory),
        threads=threads,
        nats_url=nats,
        leaf_door=None if leaf_port is None else _leaf_door(leaf_host, leaf_port, leaf_user, leaf_password),
        redis_url=redis,
        otlp_endpoint=otlp_endpoint,
        log_folder=log_dir,
        ready_timeout_s=ready_timeout,
        sample=sample,
        exit_after_ready=exit_after_ready,
    )
    if stages is not None and stages > workers:
        raise typer.BadParameter(f"{stages} stages need as many workers; --workers is {workers}")
    if leaf_port is not None and nats is not None:
        raise typer.BadParameter("--leaf-port opens our own NATS server; the one given with --nats opens its own doors")
    if dtype != "auto" and dtype not in list(Dtype):
        raise typer.BadParameter(f"--dtype {dtype}: give auto, {', '.join(Dtype)}")
    _refuse_missing_extras()
    # the bus's own warnings belong into a service's log; here the lines of the supervisor say what is wrong
    logging.getLogger().addHandler(logging.NullHandler())
    raise typer.Exit(_run_until_signalled(options, Console(highlight=False, soft_wrap=True)))


def _leaf_door(host: str, port: int, user: str | None, password: str | None) -> LeafDoor:
    if (user is None or password is None) and host not in ("127.0.0.1", "::1", "localhost"):
        raise typer.BadParameter(
            "--leaf-port lets others in: give --leaf-user and --leaf-password, or MOLINK_NATS_USER and "
            "MOLINK_NATS_PASSWORD"
        )
    credentials = None if user is None or password is None else Credentials(user=user, password=password)
    return LeafDoor(host=host, port=port, credentials=credentials)


def _refuse_missing_extras() -> None:
    needed = {"gateway": "fastapi", "scheduler": "redis", "stage-worker": "torch"}
    for service in SERVICES:
        if importlib.util.find_spec(needed[service.extra]) is None:
            raise MissingExtra(f"molink up needs {needed[service.extra]}: pip install 'molink[all]'")


def _run_until_signalled(options: UpOptions, console: Console) -> int:
    """The exit code: 0 when it was ready and was then told to stop."""
    progress = Progress()
    try:
        with asyncio.Runner() as runner:
            return runner.run(_main(options, console, progress))
    except asyncio.CancelledError:
        return 0 if progress.was_ready else _INTERRUPTED
    except BaseExceptionGroup as group:
        raise _first_known(group) from None


async def _main(options: UpOptions, console: Console, progress: Progress) -> int:
    task = asyncio.current_task()
    assert task is not None
    on_signal = _signal_handler(task, console, progress)
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and sys.platform != "win32":
            loop.add_signal_handler(getattr(signal, name), on_signal)
    return await bring_up(options, console, progress)


def _signal_handler(task: asyncio.Task[int], console: Console, progress: Progress) -> Callable[[], None]:
    """The first signal stops everything in order, a second one at once."""
    seen = False

    def on_signal() -> None:
        nonlocal seen
        if not seen:
            seen = True
            console.print("\nstopping …")
            task.cancel()
        elif progress.supervisor is not None:
            progress.supervisor.kill_all()

    return on_signal


def _first_known(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that started it: one of ours if there is one."""
    flat: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            flat.append(error)
    return next((error for error in flat if isinstance(error, MolinkError)), flat[0])
