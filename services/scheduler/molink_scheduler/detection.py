"""How a loss is noticed.

    a closed connection (the broker tells) or a late heartbeat ─▶ ProbeWorker ─▶ nobody listens ─▶ lost, at once
    no heartbeat for `worker_silent_s`, longer where they come late over a busy link (see `lags`) ─▶ lost
    a pass that computes far longer than any before it                                          ─▶ its stage is lost
    a neighbour's frames are not acknowledged, and no step comes out                            ─▶ its stage is lost

Silence counts only while this scheduler could hear: while NATS was up and time passed without a gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from molink_common.messages import StagePhase, StageReport
from molink_scheduler.books import Books, Pipeline, Worker
from molink_scheduler.instructions import BroadcastState, Instruction, NoteLoss, ProbeWorker
from molink_scheduler.lags import Lag

LATE_TICK_S = 1.0
"""Time that passes in a larger step than this was spent without listening."""
OVERDUE_S = 0.8
"""A heartbeat comes every half second."""
PROBE_AGAIN_S = 0.5
CONNECTING_S = 1.0
"""For so long after an outage, a worker whom nobody can reach may only not be back yet."""
HUNG_PASS_S = 10.0
HUNG_PASS_RATIO = 5.0
"""A pass that takes this many times as long as the longest that ended, and `HUNG_PASS_S` at least, hangs."""
STUCK_S = 30.0
"""No step came out and the head's oldest is this old: frames were lost."""
LOAD_STALLED_S = 600.0
"""A stage that gets on with loading no more."""
MOST_LAGS = 4096
"""Workers whose links are remembered."""
UNREPORTED_S = 3.0
"""How long after a worker took its stage the heartbeats may not speak of it."""
FAILED_BARRED_S = 30.0
"""How long a worker whose stage failed is left out."""
LINK_LOST_S = 10.0
"""A stage's frames are not acknowledged for so long, and no step comes out: they do not reach the next stage."""
LINK_BARRED_S = 30.0
"""How long a worker that a neighbour's frames do not reach is left out."""
HUNG_BARRED_S = 60.0
"""How long a worker whose device hung is left out."""


def time_passed(books: Books, bus_up: bool, now_s: float) -> Iterator[Instruction]:
    """Look for workers that are silent, unless it is this scheduler that did not hear."""
    is_late = books.ticked_s is not None and now_s - books.ticked_s > LATE_TICK_S
    books.ticked_s = now_s
    if is_late or not bus_up:
        books.deaf_until_s = now_s
        return
    for worker in list(books.workers.values()):
        quiet_s = now_s - max(worker.heard_s, books.deaf_until_s)
        lag = books.lags.get(worker.name)
        patience_s = books.settings.worker_silent_s + (lag.extra_s(now_s) if lag is not None else 0.0)
        if quiet_s >= patience_s:
            yield from _forget(books, worker, f"silent for {now_s - worker.heard_s:.1f} s", now_s)
        elif quiet_s >= OVERDUE_S and (worker.probed_s is None or now_s - worker.probed_s >= PROBE_AGAIN_S):
            worker.probed_s = now_s
            yield ProbeWorker(worker.name)


def beat(books: Books, name: str, sent_s: float | None, now_s: float) -> None:
    """Note how late a heartbeat came."""
    if sent_s is None:
        return
    lag = books.lags.pop(name, None) or Lag()
    books.lags[name] = lag
    lag.heard(sent_s, now_s)
    if len(books.lags) > MOST_LAGS:
        del books.lags[next(iter(books.lags))]


def disconnected(books: Books, name: str, now_s: float) -> Iterator[Instruction]:
    """A connection is closed: ask whether that was the worker's end."""
    worker = books.workers.get(name)
    if worker is not None:
        worker.probed_s = now_s
        yield ProbeWorker(name)


def probed(books: Books, name: str, is_there: bool, now_s: float) -> Iterator[Instruction]:
    """Nobody in a worker's place means that it is gone. That somebody is there says nothing of its device."""
    worker = books.workers.get(name)
    if worker is None or is_there or worker.probed_s is None or worker.heard_s > worker.probed_s:
        return
    if now_s - books.deaf_until_s < CONNECTING_S:
        return
    yield from _forget(books, worker, "its process or its connection has ended", now_s)


def losses(books: Books, pipeline: Pipeline, now_s: float) -> dict[str, str]:
    """Workers of the layer map whose stages are lost, each with the reason, head first."""
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    lost: dict[str, str] = {}
    for stage in layout.stages:
        worker = books.workers.get(stage.worker)
        if worker is not None:
            problem = _problem_of_stage(pipeline, worker, now_s)
            if problem is not None:
                lost[stage.worker] = problem
        elif now_s >= pipeline.awaited_until_s:
            lost[stage.worker] = pipeline.gone.get(stage.worker, "it has not been heard of")
    return lost or _unreached(books, pipeline, now_s)


def is_stuck(books: Books, pipeline: Pipeline, now_s: float) -> bool:
    """Whether steps have been lost without anybody being lost."""
    return _no_step_for(books, pipeline, STUCK_S, now_s)


def _unreached(books: Books, pipeline: Pipeline, now_s: float) -> dict[str, str]:
    """The first stage that the frames of the one before it do not reach, though both of them live."""
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    if not pipeline.is_ready or not _no_step_for(books, pipeline, LINK_LOST_S, now_s):
        return {}
    for before, after in pairwise(layout.stages):
        sender, receiver = books.workers.get(before.worker), books.workers.get(after.worker)
        report = sender.report_of(layout) if sender is not None else None
        link = report.link if report is not None else None
        if receiver is not None and link is not None and link.unacknowledged_s > LINK_LOST_S:
            problem = f"frames of worker {before.worker} have not reached it for {link.unacknowledged_s:.0f} s"
            bar(receiver, problem, now_s + LINK_BARRED_S)
            return {receiver.name: problem}
    return {}


def _no_step_for(books: Books, pipeline: Pipeline, seconds: float, now_s: float) -> bool:
    layout = pipeline.layout
    assert layout is not None, "asked of a pipeline with a layer map"
    head = books.workers.get(layout.head)
    report = head.report_of(layout) if head is not None else None
    oldest_s = report.head.oldest_step_age_s if report is not None and report.head is not None else 0.0
    return oldest_s > seconds and now_s - max(pipeline.stepped_s, books.deaf_until_s) > seconds


def bar(worker: Worker, because: str, until_s: float) -> None:
    """Leave a worker out for a while."""
    worker.barred_until_s, worker.barred_because = until_s, because


def _forget(books: Books, worker: Worker, because: str, now_s: float) -> Iterator[Instruction]:
    del books.workers[worker.name]
    pipeline = books.pipeline_of(worker.name)
    if pipeline is not None:
        pipeline.gone[worker.name] = because
    yield NoteLoss(worker.name, because, now_s - worker.heard_s)
    yield BroadcastState()


def _problem_of_stage(pipeline: Pipeline, worker: Worker, now_s: float) -> str | None:
    layout, beat = pipeline.layout, worker.heartbeat
    assert layout is not None, "asked of a pipeline with a layer map"
    if beat.problem is not None:
        return beat.problem
    if now_s < worker.barred_until_s:
        return worker.barred_because
    report = worker.report_of(layout)
    if report is not None:
        return _problem_of_report(worker, report, now_s)
    accepted_s = pipeline.accepted_s.get(worker.name)
    if pipeline.is_ready or (beat.stage is not None and beat.stage.epoch > layout.epoch):
        return "it has lost its stage"
    if accepted_s is not None and worker.heard_s >= accepted_s + UNREPORTED_S:
        return "it does not report the stage that it was given"
    return None


def _problem_of_report(worker: Worker, report: StageReport, now_s: float) -> str | None:
    if report.phase is StagePhase.FAILED:
        bar(worker, f"its stage failed: {report.problem or 'it does not say why'}", now_s + FAILED_BARRED_S)
        return worker.barred_because
    if report.phase is StagePhase.LOADING and now_s - worker.progress_s >= LOAD_STALLED_S:
        bar(worker, f"loading has stood still for {LOAD_STALLED_S:g} s", now_s + FAILED_BARRED_S)
        return worker.barred_because
    if report.pass_age_s > max(HUNG_PASS_S, HUNG_PASS_RATIO * report.longest_pass_s):
        bar(worker, f"its device hangs: a pass has been computing for {report.pass_age_s:.0f} s", now_s + HUNG_BARRED_S)
        return worker.barred_because
    return None
