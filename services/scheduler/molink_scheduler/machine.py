"""The scheduler's decisions: events in, instructions out. No IO, no clock, no randomness.

    Restored ─▶ HeartbeatArrived … ─▶ TakeEpoch ─▶ EpochTaken ─▶ SavePipeline, AssignStageTo × stages
             ─▶ HeartbeatArrived(READY) × stages ─▶ the pipeline is ready
    SequenceSubmitted ─▶ SaveSequence ─▶ SequenceSaved ─▶ ReplyTo(Admitted), StartSequenceAt(head)
             ─▶ TokensArrived … ─▶ AppendTokens … ─▶ (finish) DeleteSequence

The shell feeds events one at a time and carries the instructions out in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from molink_common.messages import ClusterState
from molink_scheduler import detection, holes, key_desk, pipeline_desk, resumption, sequence_desk, standby
from molink_scheduler.books import Books, PipelinePhase
from molink_scheduler.events import (
    AssignAnswered,
    CancelAsked,
    EpochTaken,
    Event,
    GatewayAliveArrived,
    HeartbeatArrived,
    KeyAddAsked,
    KeyRevokeAsked,
    KeysAsked,
    KeySaved,
    PreloadAnswered,
    Restored,
    ResumeAsked,
    SequenceSaved,
    SequencesHeldArrived,
    SequenceSubmitted,
    StartAnswered,
    StoreChanged,
    StoreEmptied,
    Tick,
    TokensArrived,
    WorkerDisconnected,
    WorkerProbed,
)
from molink_scheduler.instructions import (
    AppendTokens,
    BroadcastState,
    Instruction,
    ReplyTo,
    SavePipeline,
    SaveSequence,
)
from molink_scheduler.records import Snapshot
from molink_scheduler.report import cluster_state
from molink_scheduler.settings import SchedulerSettings

GATEWAY_SILENT_S = 10.0
BROADCAST_EVERY_S = 1.0


class Machine:
    """All decisions of one scheduler. `now_s` never goes back."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.books = Books(settings=settings)

    def handle(self, event: Event, *, now_s: float) -> list[Instruction]:
        """What is to be done about an event."""
        return _one_broadcast(list(self._decide(event, now_s)))

    def state(self, *, now_s: float) -> ClusterState:
        """The state of everything."""
        return cluster_state(self.books, now_s)

    def _decide(self, event: Event, now_s: float) -> Iterator[Instruction]:  # noqa: PLR0912, PLR0915  one case an event
        books = self.books
        match event:
            case TokensArrived(step):
                yield from sequence_desk.tokens(books, step, now_s)
            case HeartbeatArrived(heartbeat):
                yield from pipeline_desk.heartbeat(books, heartbeat, now_s)
                yield from pipeline_desk.plan(books, now_s)
            case Tick(bus_up, utc_s):
                if utc_s is not None:
                    books.keys.set_clock(utc_s, now_s)
                yield from self._time_passed(bus_up, now_s)
            case WorkerDisconnected(worker):
                yield from detection.disconnected(books, worker, now_s)
            case WorkerProbed(worker, is_there):
                yield from detection.probed(books, worker, is_there, now_s)
                yield from pipeline_desk.plan(books, now_s)
            case GatewayAliveArrived(gateway):
                books.gateways_heard_s[gateway] = now_s
            case SequenceSubmitted(request, reply):
                yield from sequence_desk.submit(books, request, reply, now_s)
            case SequenceSaved(sequence):
                yield from sequence_desk.saved(books, sequence, now_s)
            case CancelAsked(sequence, reason, after_tokens):
                yield from sequence_desk.cancel(books, sequence, reason, now_s, after_tokens=after_tokens)
            case ResumeAsked(request, reply):
                yield from holes.asked_for(books, request.sequence, now_s)
                yield from resumption.resume(books, request, reply, now_s)
                yield from sequence_desk.mend(books, request.sequence, now_s)
            case StartAnswered(sequence, epoch, problem):
                yield from sequence_desk.start_answered(books, sequence, epoch, problem, now_s)
            case SequencesHeldArrived(held, asked_at_s):
                yield from sequence_desk.compare(books, held, asked_at_s, now_s)
            case EpochTaken(epoch, pipeline):
                yield from pipeline_desk.epoch_taken(books, pipeline, epoch, now_s)
            case AssignAnswered(worker, epoch, problem):
                pipeline_desk.assign_answered(books, worker, epoch, problem, now_s)
                yield from pipeline_desk.plan(books, now_s)
            case PreloadAnswered(worker, problem):
                standby.preload_answered(books, worker, problem)
            case StoreChanged(up):
                books.store_down_s = None if up else now_s
                yield BroadcastState()
            case StoreEmptied():
                yield from self._save_everything()
            case KeysAsked(reply):
                yield ReplyTo(reply, books.keys.table(now_s))
            case KeyAddAsked(key, reply):
                yield from key_desk.add(books, key, reply)
            case KeyRevokeAsked(key, reply):
                yield from key_desk.revoke(books, key, reply, now_s)
            case KeySaved(key):
                yield from key_desk.saved(books, key)
            case Restored(snapshot, utc_s):
                books.keys.set_clock(utc_s, now_s)
                yield from self._restore(snapshot, now_s)
            case _:
                assert_never(event)

    def _time_passed(self, bus_up: bool, now_s: float) -> Iterator[Instruction]:
        books = self.books
        yield from detection.time_passed(books, bus_up, now_s)
        if bus_up:
            for gateway, heard_s in list(books.gateways_heard_s.items()):
                if now_s - max(heard_s, books.deaf_until_s) >= GATEWAY_SILENT_S:
                    yield from sequence_desk.gateway_gone(books, gateway, now_s)
        yield from resumption.time_passed(books, now_s)
        yield from holes.time_passed(books, now_s)
        yield from sequence_desk.time_passed(books, now_s)
        yield from pipeline_desk.plan(books, now_s)
        yield from books.keys.time_passed(now_s)
        if books.broadcast_s is None or now_s - books.broadcast_s >= BROADCAST_EVERY_S:
            books.broadcast_s = now_s
            yield BroadcastState()

    def _restore(self, snapshot: Snapshot, now_s: float) -> Iterator[Instruction]:
        books = self.books
        assert books.pipeline.phase is PipelinePhase.WAITING and not books.workers, "restored once, at the start"
        books.highest_epoch = snapshot.epoch
        books.keys.restore(snapshot)
        for record in sorted(snapshot.pipelines, key=lambda one: -one.epoch):
            books.highest_epoch = max(books.highest_epoch, record.epoch)
            # a pipeline that was given up is still in the store: its workers have a later one
            if all(books.pipeline_of(worker) is None for worker in record.workers):
                pipeline_desk.restore(books, record, now_s)
        for stored in snapshot.sequences:
            yield from sequence_desk.restore(books, stored, now_s)
        for heartbeat in snapshot.workers:
            yield from pipeline_desk.heartbeat(books, heartbeat, now_s)
        yield from pipeline_desk.plan(books, now_s)
        yield BroadcastState()

    def _save_everything(self) -> Iterator[Instruction]:
        books = self.books
        for pipeline in books.pipelines.values():
            if pipeline.layout is not None:
                yield SavePipeline(pipeline.layout)
        yield from books.keys.everything()
        kept = [(one.record, tuple(one.generated)) for one in (*books.sequences.values(), *books.holed.values())]
        kept += [(one.record, one.generated) for one in books.ended.values()]
        for record, generated in kept:
            yield SaveSequence(record)
            if generated:
                yield AppendTokens(record.request.sequence, 0, generated)


def _one_broadcast(instructions: list[Instruction]) -> list[Instruction]:
    """One broadcast an event is enough: the first stays where it is, so that readiness is not delayed."""
    kept: list[Instruction] = []
    is_told = False
    for instruction in instructions:
        if isinstance(instruction, BroadcastState):
            if is_told:
                continue
            is_told = True
        kept.append(instruction)
    return kept
