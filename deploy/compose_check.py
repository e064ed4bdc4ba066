"""Proof that the containers work: build, start, ask, look inside, scale, kill, take down.

    python3 deploy/compose_check.py [--keep] [--no-build] [--no-jaeger]

Needs docker with Compose, and nothing but Python's own library. It runs as a project of its own (molink-check)
on free ports, so that a pool on the same machine is not disturbed. One line a step; the first step that fails
prints the last lines of every service and ends the run with exit code 1. Volumes are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from compose_tools import (
    PROJECT,
    CheckFailed,
    Compose,
    expect_paris,
    post_chat,
    run,
    stream_chat,
    trace_seen,
    until,
)

READY_TIMEOUT_S = 600.0
"""A first start downloads the model and converts it."""
QUESTION = "Name the capital of France."
LONG_TASK = "Count from one to one hundred in words, separated by commas."

CONNECT = "import socket; socket.create_connection(('redis', 6379), 3)"


class Check:
    """The steps, in order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.compose = Compose()
        self.gateway = ""
        self.killed = ""

    def build(self) -> str:
        """All three images."""
        self.compose("build", timeout_s=3600)
        return "gateway, scheduler, stage-worker"

    def images(self) -> str:
        """Torch is where it belongs and nowhere else."""
        services = json.loads(self.compose("config", "--format", "json"))["services"]
        sizes = []
        for service in ("gateway", "scheduler", "stage-worker"):
            image = services[service]["image"]
            code = "import importlib.util as u; print(u.find_spec('torch') is not None)"
            has_torch = run(["docker", "run", "--rm", image, "python", "-c", code], timeout_s=60).strip()
            if has_torch != str(service == "stage-worker"):
                raise CheckFailed(f"{image}: torch installed is {has_torch}")
            size = int(run(["docker", "image", "inspect", "-f", "{{.Size}}", image], timeout_s=30))
            sizes.append(f"{service} {size / 1e6:.0f} MB")
        return "torch only in stage-worker; " + ", ".join(sizes)

    def start(self) -> str:
        """The system with two workers."""
        scales = ["--scale", "stage-worker=2"] + (["--scale", "jaeger=0"] if self.options.no_jaeger else [])
        self.compose("up", "-d", "--no-build", *scales, timeout_s=300)
        self.gateway = self.compose.address("gateway", 8000)
        return f"gateway on {self.gateway}"

    def alive_before_ready(self) -> str:
        """Liveness is not readiness: the server answers while no pipeline does."""
        status = until("an HTTP answer", self._ready_status, 60)
        return f"/ready gives {status}"

    def ready(self) -> str:
        """The gateway says that a pipeline can answer."""
        until("/ready 200", lambda: "200" if self._ready_status() == "200" else None, READY_TIMEOUT_S)
        return self._pipelines()

    def answer_whole(self) -> str:
        """One answer in one piece."""
        with post_chat(self.gateway, QUESTION, stream=False, max_tokens=32) as answer:
            return expect_paris(json.load(answer)["choices"][0]["message"]["content"])

    def answer_streamed(self) -> str:
        """The same answer in pieces."""
        pieces = list(stream_chat(self.gateway, QUESTION, max_tokens=32))
        return f"{len(pieces)} pieces: {expect_paris(''.join(pieces))}"

    def healthy(self) -> str:
        """Docker's own view of every container."""
        return until("every container healthy", self._all_healthy, 90)

    def users(self) -> str:
        """No process of any container runs as root."""
        seen = []
        for container in self.compose("ps", "-q").split():
            lines = run(["docker", "top", container, "-o", "uid,pid,comm"], timeout_s=30).splitlines()[1:]
            for line in lines:
                uid, _, command = line.split(maxsplit=2)
                if uid == "0":
                    raise CheckFailed(f"{command} in {container} runs as root")
                seen.append(uid)
        return f"{len(seen)} processes, user ids {', '.join(sorted(set(seen)))}"

    def store_is_apart(self) -> str:
        """Only the scheduler reaches Redis."""
        self.compose("exec", "-T", "scheduler", "python", "-c", CONNECT)
        for service in ("gateway", "stage-worker"):
            try:
                self.compose("exec", "-T", service, "python", "-c", CONNECT)
            except CheckFailed:
                continue
            raise CheckFailed(f"{service} reaches Redis")
        return "scheduler yes, gateway and stage-worker no"

    def traces(self) -> str:
        """A request's trace holds spans of the gateway and of both stages."""
        if self.options.no_jaeger:
            return "no collector: not looked at"
        jaeger = self.compose.address("jaeger", 16686)
        return until("a trace with spans of the gateway and two stages", lambda: trace_seen(jaeger), 60)

    def scale_up(self) -> str:
        """A third worker joins without an operator, and the pool answers again."""
        self.compose("up", "-d", "--no-build", "--no-recreate", "--scale", "stage-worker=3", *self._jaeger_scale())
        until("three workers known", lambda: "yes" if self._serving_workers() >= 3 else None, 120)
        self.ready()
        return f"{self._pipelines()}; {self.answer_whole()}"

    def kill_worker(self) -> str:
        """A worker dies in the middle of a stream; the stream ends as if nothing had happened."""
        expected = "".join(stream_chat(self.gateway, LONG_TASK, max_tokens=120))
        self.killed = self.compose.containers("stage-worker")[-1]
        pieces: list[str] = []
        longest_gap_s, last = 0.0, time.monotonic()
        killer: threading.Thread | None = None
        for piece in stream_chat(self.gateway, LONG_TASK, max_tokens=120):
            now = time.monotonic()
            longest_gap_s, last = max(longest_gap_s, now - last), now
            pieces.append(piece)
            if killer is None and len(pieces) == 10:
                # every process of the container at once, as a crash would; `docker kill` would forbid the restart
                command = ["docker", "exec", self.killed, "sh", "-c", "kill -9 -1"]
                killer = threading.Thread(target=run, args=(command,), kwargs={"timeout_s": 30, "check": False})
                killer.start()
        if killer is None:
            raise CheckFailed("the answer was over before the worker could be killed")
        killer.join()
        same = "the same text as without the fault" if "".join(pieces) == expected else "ANOTHER text than without"
        if "".join(pieces) != expected:
            raise CheckFailed(f"{same}: {''.join(pieces)!r} instead of {expected!r}")
        return f"{same}, longest pause {longest_gap_s:.1f} s"

    def comes_back(self) -> str:
        """The restart policy brings the worker back and it joins again."""
        restarts = run(["docker", "inspect", "-f", "{{.RestartCount}}", self.killed], timeout_s=30).strip()
        if restarts == "0":
            raise CheckFailed("the worker that was killed was not started again")
        until("three workers again", lambda: "yes" if self._serving_workers() >= 3 else None, 120)
        self.ready()
        return f"{self._pipelines()}; {self.answer_whole()}"

    def without_collector(self) -> str:
        """The collector goes away; answers do not."""
        if self.options.no_jaeger:
            return "it was never there"
        self.compose("rm", "-sf", "jaeger")
        return self.answer_whole()

    def stop(self) -> str:
        """Asked to stop, every service of ours finishes by itself."""
        self.compose("stop", timeout_s=180)
        template = '{{index .Config.Labels "com.docker.compose.service"}} {{.State.ExitCode}}'
        codes = run(
            ["docker", "inspect", "-f", template, *self.compose("ps", "-aq").split()], timeout_s=30
        ).splitlines()
        ours = [line for line in codes if line.split()[0] in ("gateway", "scheduler", "stage-worker")]
        if not ours or any(line.split()[1] != "0" for line in ours):
            raise CheckFailed(f"exit codes: {', '.join(ours)}")
        return f"{len(ours)} containers of ours ended with 0"

    def take_down(self) -> str:
        """Nothing of the project is left."""
        self.compose("down", "-v", "--remove-orphans", timeout_s=180)
        label = f"label=com.docker.compose.project={PROJECT}"
        left = run(["docker", "ps", "-aq", "--filter", label], timeout_s=30).split()
        left += run(["docker", "volume", "ls", "-q", "--filter", label], timeout_s=30).split()
        if left:
            raise CheckFailed(f"left behind: {' '.join(left)}")
        return "no container and no volume left"

    def _jaeger_scale(self) -> list[str]:
        return ["--scale", "jaeger=0"] if self.options.no_jaeger else []

    def _ready_status(self) -> str | None:
        try:
            with urlopen(self.gateway + "/ready", timeout=5) as answer:  # noqa: S310  http on this machine
                return str(answer.status)
        except HTTPError as error:
            return str(error.code)
        except (URLError, OSError):
            return None

    def _all_healthy(self) -> str | None:
        rows = [json.loads(line) for line in self.compose("ps", "--format", "json").splitlines()]
        states = {row["Name"]: row["Health"] or row["State"] for row in rows}
        return f"{len(states)} containers" if set(states.values()) <= {"healthy", "running"} else None

    def _serving_workers(self) -> int:
        try:
            workers = self.compose.cluster_state()["workers"]
        except CheckFailed:
            return 0
        return sum(1 for worker in workers if worker["silent_s"] < 3)

    def _pipelines(self) -> str:
        state = self.compose.cluster_state()
        maps = [" + ".join(f"[{first}, {last})" for first, last in one["layers"]) for one in state["pipelines"]]
        return f"{len(state['workers'])} workers, layers {'; '.join(maps)}"


@contextmanager
def cleaned_up(check: Check) -> Iterator[None]:
    """Takes the project down, whatever happens; before that, a failure shows the services' last words."""
    try:
        yield
    except CheckFailed as error:
        print(f"FAILED: {error}", flush=True)
        print(check.compose("ps", "-a", check=False), flush=True)
        print(check.compose("logs", "--no-color", "--tail", "40", check=False)[-20000:], flush=True)
        raise
    finally:
        if not check.options.keep:
            check.compose("down", "-v", "--remove-orphans", timeout_s=180, check=False)


def main() -> int:
    """All steps, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the system running at the end")
    parser.add_argument("--no-build", action="store_true", help="use the images that are there")
    parser.add_argument("--no-jaeger", action="store_true", help="run without a collector for traces")
    check = Check(parser.parse_args())
    steps: list[tuple[str, Callable[[], str]]] = [
        ("build the images", check.build),
        ("look into the images", check.images),
        ("start with two workers", check.start),
        ("HTTP answers", check.alive_before_ready),
        ("a pipeline is ready", check.ready),
        ("answer in one piece", check.answer_whole),
        ("answer streamed", check.answer_streamed),
        ("health checks", check.healthy),
        ("nothing runs as root", check.users),
        ("who reaches Redis", check.store_is_apart),
        ("traces", check.traces),
        ("scale to three workers", check.scale_up),
        ("kill a worker mid-stream", check.kill_worker),
        ("the worker comes back", check.comes_back),
        ("without the collector", check.without_collector),
        ("stop", check.stop),
        ("take everything down", check.take_down),
    ]
    skipped = {check.build} if check.options.no_build else set()
    if check.options.keep:
        skipped |= {check.stop, check.take_down}
    # ended from outside it takes everything down as well, as after Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    begun = time.monotonic()
    try:
        with cleaned_up(check):
            for number, (name, step) in enumerate(steps, 1):
                started = time.monotonic()
                said = "left out" if step in skipped else step()
                print(f"{number:2} {name:26} {time.monotonic() - started:7.1f} s  {said}", flush=True)
    except CheckFailed:
        return 1
    print(f"all steps passed in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
