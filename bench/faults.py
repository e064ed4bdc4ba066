"""Kills, stops, cuts and restarts parts of the system at random while clients stream, and judges what they saw.

    python -m bench.faults --kills 20 --seed 1 --json
    python -m bench.faults --kills 6 --kinds kill-head,kill-tail --logs /tmp/faults
    python -m bench.faults --kills 4 --kinds kill-middle --link 100m30 --worker-flags "--journal 0B"

The real system on this machine: NATS, Redis, two schedulers, two gateways, workers for one pipeline and an idle one,
each a process. First every prompt is answered while nothing is broken; then clients ask the same prompts in closed
loops, and each answer is compared with the first one, token id by token id. The driver is also the operator, who
starts again what was killed. The exit code is 0 if no stream noticed more than a pause, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.fault_lab.clients import Clients
from bench.fault_lab.faulting import FaultSeen, do_fault
from bench.fault_lab.judging import Stream
from bench.fault_lab.parts import Plan
from bench.fault_lab.plan import WITHOUT_GATEWAYS, Fault, FaultKind, plan_faults
from bench.fault_lab.prompts import Prompt, make_prompts
from bench.fault_lab.report import is_clean, judge, pauses_of, report
from bench.fault_lab.system import ChaosSystem, DidNotRun, running_system
from bench.link_grid.cells import link_of
from molink_common.errors import MolinkError
from molink_common.service import run

_READY_TIMEOUT_S = 600.0
_LAST_STREAMS_S = 300.0
_STREAMS_TIMEOUT_S = 60.0
_FLOWING_S = 1.5
_LOOK_AGAIN_S = 0.1
_WARM_WITHIN_S = 30.0


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    task = asyncio.current_task()
    if task is not None and sys.platform != "win32":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.ExitStack() as stack:
        logs = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            model=arguments.model,
            dtype=arguments.dtype,
            link=link_of(arguments.link),
            workers=arguments.workers,
            stages=arguments.stages,
            scheduler_flags=tuple(arguments.scheduler_flags.split()),
            worker_flags=tuple(arguments.worker_flags.split()),
        )
        async with running_system(plan, logs) as system:
            if (missing := await system.until_whole(_READY_TIMEOUT_S, warm_within_s=_WARM_WITHIN_S)) is not None:
                raise DidNotRun(f"the system does not become ready: {missing}")
            return await _run(system, arguments, logs)


async def _run(system: ChaosSystem, arguments: argparse.Namespace, logs: Path) -> dict[str, Any]:
    prompts = make_prompts(arguments.prompts)
    clients = Clients(system.gateway_ports, model=arguments.model, resumes=arguments.gateways)
    began_s = time.monotonic()
    first = await _undisturbed(clients, prompts, arguments.clients)
    _say(f"{len(prompts)} answers recorded in {time.monotonic() - began_s:.0f} s")
    control = [
        stream for _ in range(arguments.control) for stream in await _undisturbed(clients, prompts, arguments.clients)
    ]
    faults = plan_faults(arguments.kills, arguments.kinds, arguments.seed)
    seen, skipped = await _disturbed(system, clients, prompts, faults, arguments)
    _keep(logs / "seen.json", {"faults": seen, "first": first, "control": control, "streams": clients.streams})
    expected = {stream.prompt: stream.tokens for stream in first}
    greedy = {prompt.number: prompt.is_greedy for prompt in prompts}
    judged, judged_control = (judge(streams, expected, greedy) for streams in (clients.streams, control))
    return {
        "seed": arguments.seed,
        "clients": arguments.clients,
        **report(judged, seen, judged_control),
        "skipped": skipped,
        "accidents": system.accidents,
    }


async def _undisturbed(clients: Clients, prompts: Sequence[Prompt], at_once: int) -> list[Stream]:
    """An answer to each prompt, while nothing is broken.

    Raises:
        DidNotRun: not even now is every answer complete.
    """
    turns = asyncio.Semaphore(at_once)

    async def ask(prompt: Prompt) -> Stream:
        async with turns:
            return await clients.ask(prompt.number, prompt)

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(prompt)) for prompt in prompts]
    streams = [task.result() for task in asked]
    for prompt, stream in zip(prompts, streams, strict=True):
        if stream.problem is not None or len(stream.tokens) != prompt.max_tokens:
            raise DidNotRun(
                f"prompt {prompt.number} has {len(stream.tokens)} of {prompt.max_tokens} tokens with nothing broken: "
                f"{stream.problem}"
            )
    return streams


async def _disturbed(
    system: ChaosSystem,
    clients: Clients,
    prompts: Sequence[Prompt],
    faults: Sequence[Fault],
    arguments: argparse.Namespace,
) -> tuple[list[FaultSeen], int]:
    """The faults one after the other, while every client streams; and how many had nobody to be done to."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        loops = [tasks.create_task(clients.loop(client, prompts, stop)) for client in range(arguments.clients)]
        seen = await _do_faults(system, clients, faults, arguments)
        stop.set()
        _, hanging = await asyncio.wait(loops, timeout=_LAST_STREAMS_S)
        if hanging:
            raise DidNotRun(f"{len(hanging)} streams have not ended {_LAST_STREAMS_S:g} s after the last fault")
    return [one for one in seen if one is not None], seen.count(None)


async def _do_faults(
    system: ChaosSystem, clients: Clients, faults: Sequence[Fault], arguments: argparse.Namespace
) -> list[FaultSeen | None]:
    seen: list[FaultSeen | None] = []
    told_accidents = 0
    ends_s = time.monotonic() + arguments.within_s
    for number, fault in enumerate(faults, start=1):
        await _until_streams_run(clients, arguments.clients // 2)
        await asyncio.sleep(fault.streams_before_s)
        if time.monotonic() > ends_s:
            _say(f"{arguments.within_s:g} s are over; {len(faults) - len(seen)} faults are left out")
            break
        seen.append(await do_fault(system, fault, whole_within_s=arguments.whole_within_s))
        _say(f"{number:3}/{len(faults)} " + _line(fault, seen[-1], clients.streams_so_far()))
        for accident in system.accidents[told_accidents:]:
            _say(f"        {accident}")
        told_accidents = len(system.accidents)
    return seen


async def _until_streams_run(clients: Clients, least: int) -> None:
    """A fault that meets nobody shows nothing. Bounded: a system that serves nobody is to be judged, too."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STREAMS_TIMEOUT_S):
            while clients.num_flowing(_FLOWING_S) < least:  # noqa: ASYNC110  a count of many has no event
                await asyncio.sleep(_LOOK_AGAIN_S)


def _line(fault: Fault, seen: FaultSeen | None, streams: Sequence[Stream]) -> str:
    if seen is None:
        return f"{fault.kind}: nobody to do it to"
    noticed = "never" if seen.noticed_after_s is None else f"after {seen.noticed_after_s:.3f} s"
    pauses = pauses_of(streams, seen)
    cut = sum(1 for stream in streams if stream.problem is not None and stream.ended_s > seen.done_s)
    line = (
        f"{fault.kind:14} {seen.target:11} for {fault.lasts_s:4.1f} s  noticed {noticed:13} "
        f"{len(pauses):2} streams, pause {max(pauses, default=0):5.2f} s, {cut} cut  "
        f"whole after {seen.whole_s - seen.done_s:5.1f} s"
    )
    if not seen.was_warm:
        line += "  no warm standby"
    if seen.still_missing is not None:
        line += f"  NOT WHOLE: {seen.still_missing}"
    return line


def _keep(path: Path, seen: Mapping[str, Sequence[FaultSeen | Stream]]) -> None:
    """Everything that was seen, for whoever looks for the cause. Times are to be compared with `now_s`."""
    told = {name: [dataclasses.asdict(one) for one in values] for name, values in seen.items()}
    path.write_text(json.dumps({"now_s": time.monotonic(), "now_at_s": time.time(), **told}))


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _kinds(text: str) -> list[FaultKind]:
    return [FaultKind(part.strip()) for part in text.split(",")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many faults, of whatever kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", type=_kinds, default=None, help=f"some of {', '.join(FaultKind)}")
    parser.add_argument(
        "--gateways", action="store_true", help="kill gateways too; clients take their streams up again"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=16, help="different ones")
    parser.add_argument("--control", type=int, default=1, help="times that each is asked again before the first fault")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--link", default="lan", help="between workers, as 100m30: 100 Mbit/s, 30 ms there and back")
    parser.add_argument("--scheduler-flags", default="", help="beside our own, in one text")
    parser.add_argument("--worker-flags", default="", help="beside our own, in one text")
    parser.add_argument("--whole-within-s", type=float, default=120.0, help="longest wait after a fault")
    parser.add_argument("--within-s", type=float, default=float("inf"), help="no further fault after so long")
    parser.add_argument(
        "--logs", type=Path, default=None, help="folder for the parts' logs and seen.json; none: not kept"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args(argv)
    if arguments.kinds is None:
        arguments.kinds = list(FaultKind) if arguments.gateways else list(WITHOUT_GATEWAYS)
    if FaultKind.KILL_GATEWAY in arguments.kinds:
        arguments.gateways = True
    return arguments


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    logging.getLogger("molink").setLevel(logging.CRITICAL)  # our own connection is broken with the others'
    outcome: dict[str, Any] = {}

    async def keep_outcome() -> None:
        outcome.update(await main(given))

    try:
        run(keep_outcome())
    except* MolinkError as errors:
        sys.exit(f"error: {_first(errors)}")
    except* (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(130)
    print(json.dumps(outcome) if given.json else json.dumps(outcome, indent=2))
    sys.exit(0 if is_clean(outcome) else 1)
