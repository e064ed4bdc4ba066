"""The scheduler's machine under random events: whatever is admitted ends exactly once, and its books agree.

Simulated workers obey the instructions, but answers and heartbeats come late, twice, or not at all, workers
come, go, leave and lose their stage, and tokens are repeated, lost, or of an old epoch.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from molink_common.messages import (
    Admitted,
    AssignStage,
    FinishReason,
    Heartbeat,
    Resumed,
    ResumeSequence,
    SequencesHeld,
    StagePhase,
    StageReport,
    StartSequence,
    StepTokens,
    TokenEvent,
)
from molink_scheduler.books import PipelinePhase, SequencePhase
from molink_scheduler.events import (
    AssignAnswered,
    CancelAsked,
    EpochTaken,
    Event,
    GatewayAliveArrived,
    HeartbeatArrived,
    PreloadAnswered,
    Restored,
    ResumeAsked,
    SequenceSaved,
    SequencesHeldArrived,
    SequenceSubmitted,
    StartAnswered,
    StoreEmptied,
    Tick,
    TokensArrived,
    WorkerDisconnected,
    WorkerProbed,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    AssignStageTo,
    BroadcastState,
    DeleteSequence,
    FailSequence,
    Instruction,
    NoteLoss,
    PreloadStagesAt,
    ProbeWorker,
    ReleaseStageOf,
    ReplyTo,
    SavePipeline,
    SaveSequence,
    SaveWorker,
    StartSequenceAt,
    StopSequenceAt,
    TakeEpoch,
)
from molink_scheduler.machine import Machine
from molink_scheduler.records import PipelineRecord, Snapshot, StoredSequence
from tests.scheduler_builders import FakeWorker, make_heartbeat, make_request, make_settings

MAX_TOKENS = 4
NAMES = ("w1", "w2", "w3", "w4")


def true_token(sequence: str, index: int) -> int:
    """A function of sequence and index alone, as sampling is."""
    return (int(sequence, 16) * 31 + index) % 100


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        stages=st.sampled_from(("auto", 2)), pipelines=st.sampled_from(("auto", 1)), max_sequences=st.integers(1, 4)
    )
    def begin(self, stages: str | int, pipelines: str | int, max_sequences: int) -> None:
        self.settings = make_settings(
            stages=stages, pipelines=pipelines, max_sequences=max_sequences, pipeline_wait_s=20.0
        )
        self.now_s = 100.0
        self.workers: dict[str, FakeWorker] = {}
        self.inbox: list[Event] = []
        self.store: dict[str, StoredSequence] = {}
        self.layouts: dict[int, PipelineRecord] = {}
        self.epoch = self.assigned_epoch = 0
        self.number = 0
        self.submitted: dict[int, str] = {}
        self.admitted: set[str] = set()
        self.ended: set[str] = set()
        self.cancelled: set[str] = set()
        self.old_steps: list[StepTokens] = []
        self.old_beats: list[Heartbeat] = []
        self.machine = Machine(self.settings)
        self.post(Restored(Snapshot()))

    # --- carrying out, as the shell does ---

    def post(self, event: Event) -> None:
        for instruction in self.machine.handle(event, now_s=self.now_s):
            self.carry_out(instruction)

    def carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case TakeEpoch(above, pipeline):
                self.epoch = max(self.epoch, above) + 1
                self.inbox.append(EpochTaken(self.epoch, pipeline))
            case AssignStageTo(name, stage):
                assert stage.epoch >= self.assigned_epoch
                self.assigned_epoch = stage.epoch
                self.inbox.append(AssignAnswered(name, stage.epoch, self.assign(name, stage)))
            case StartSequenceAt(name, start):
                self.inbox.append(StartAnswered(start.sequence, start.epoch, self.start(name, start)))
            case StopSequenceAt(name, stop):
                if name in self.workers:
                    self.workers[name].held.pop(stop.sequence, None)
            case ReleaseStageOf(name, pipeline):
                held_stage = self.workers[name].assignment if name in self.workers else None
                if held_stage is not None and held_stage.pipeline == pipeline:
                    self.workers[name].assignment = None
            case AskSequencesOf(name, pipeline):
                worker = self.workers.get(name)
                stage_held = worker.assignment if worker is not None and worker.is_alive else None
                if worker is not None and stage_held is not None and stage_held.pipeline == pipeline:
                    held = SequencesHeld(pipeline=pipeline, epoch=stage_held.epoch, sequences=tuple(worker.held))
                    self.inbox.append(SequencesHeldArrived(held, self.now_s))
            case ReplyTo(reply, message):
                sequence = self.submitted.pop(reply)  # a second answer raises
                if isinstance(message, Admitted):
                    assert sequence in self.store
                    self.admitted.add(sequence)
                elif isinstance(message, Resumed):
                    true = [true_token(sequence, i) for i in range(MAX_TOKENS)]
                    assert list(message.generated) == true[: len(message.generated)]
                    assert (message.finish is not None) == (len(message.generated) == MAX_TOKENS)
            case FailSequence(_, failed):
                assert failed.sequence in self.admitted
            case SaveSequence(record):
                name = record.request.sequence
                tokens = self.store[name].tokens if name in self.store else ()
                self.store[name] = StoredSequence(record=record, tokens=tokens)
                self.inbox.append(SequenceSaved(name))
            case AppendTokens(name, at, tokens):
                kept = self.store[name]
                assert at <= len(kept.tokens), "a hole in the tokens"
                self.store[name] = StoredSequence(record=kept.record, tokens=(*kept.tokens[:at], *tokens))
            case DeleteSequence(name):
                self.store.pop(name, None)
                assert name not in self.ended, "ended twice"
                self.ended.add(name)
            case SavePipeline(layout):
                self.layouts[layout.pipeline] = layout
            case ProbeWorker(name):
                self.inbox.append(WorkerProbed(name, name in self.workers))
            case PreloadStagesAt(name, stages):
                if name in self.workers:
                    self.workers[name].preloaded = stages.layers[:2]
                    self.inbox.append(PreloadAnswered(name))
            case SaveWorker() | BroadcastState() | NoteLoss():
                pass

    def assign(self, name: str, stage: AssignStage) -> str | None:
        worker = self.workers.get(name)
        if worker is None or not worker.is_alive:
            return "no answer"
        if worker.assignment is not None and worker.assignment.epoch > stage.epoch:
            return "an older epoch"
        held = worker.assignment
        if stage.continues_epoch is None:
            worker.assignment, worker.phase, worker.held = stage, StagePhase.LOADING, {}
            return None
        if (
            held is None
            or worker.phase is not StagePhase.READY
            or held.epoch not in (stage.continues_epoch, stage.epoch)
        ):
            return "it does not hold that stage"
        assert (held.first_layer, held.last_layer, held.index) == (stage.first_layer, stage.last_layer, stage.index)
        assert (held.num_stages, held.num_blocks) == (stage.num_stages, stage.num_blocks)
        assert stage.rebuild is not None and stage.rebuild not in (0, stage.index)
        worker.assignment = stage
        return None

    def start(self, name: str, start: StartSequence) -> str | None:
        worker = self.workers.get(name)
        if worker is None or not worker.is_alive or worker.assignment is None:
            return "no answer"
        if worker.assignment.epoch != start.epoch or worker.assignment.index != 0:
            return "not the head of this epoch"
        assert list(start.generated) == [true_token(start.sequence, i) for i in range(len(start.generated))]
        assert len(start.generated) < MAX_TOKENS
        worker.held.setdefault(start.sequence, list(start.generated))
        return None

    def beat_of(self, name: str) -> Heartbeat:
        worker = self.workers[name]
        stage = None
        if worker.assignment is not None:
            a = worker.assignment
            stage = StageReport(
                pipeline=a.pipeline,
                epoch=a.epoch,
                index=a.index,
                first_layer=a.first_layer,
                last_layer=a.last_layer,
                phase=worker.phase,
            )
        return make_heartbeat(name, stage=stage, leaving=worker.is_leaving, preloaded=worker.preloaded)

    # --- what may happen ---

    @rule(name=st.sampled_from(NAMES))
    def join_or_restart(self, name: str) -> None:
        self.workers[name] = FakeWorker()
        self.post(HeartbeatArrived(self.beat_of(name)))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[name]
        if data.draw(st.booleans()):
            self.post(WorkerDisconnected(name))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.workers[data.draw(st.sampled_from(sorted(self.workers)))].is_leaving = True

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), phase=st.sampled_from((StagePhase.READY, StagePhase.READY, StagePhase.FAILED)))
    def load(self, data: st.DataObject, phase: StagePhase) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        if self.workers[name].phase is StagePhase.LOADING:
            self.workers[name].phase = phase

    @rule(seconds=st.sampled_from((0.1, 0.5, 0.9, 3.0)), bus_up=st.sampled_from((True, True, True, False)))
    def time_passes(self, seconds: float, bus_up: bool) -> None:
        self.now_s += seconds
        if bus_up:
            self.post(GatewayAliveArrived("g1"))
            for name in sorted(self.workers):
                self.old_beats.append(self.beat_of(name))
                self.post(HeartbeatArrived(self.old_beats[-1]))
        self.post(Tick(bus_up))

    @rule()
    def all_load_and_serve(self) -> None:
        for worker in self.workers.values():
            worker.phase = StagePhase.READY
        while self.inbox:
            self.post(self.inbox.pop(0))
        self.time_passes(1.0, True)

    @precondition(lambda self: self.old_beats)
    @rule(data=st.data())
    def a_late_heartbeat(self, data: st.DataObject) -> None:
        self.post(HeartbeatArrived(data.draw(st.sampled_from(self.old_beats[-5:]))))

    @precondition(lambda self: self.inbox)
    @rule(data=st.data(), twice=st.booleans())
    def an_answer_arrives(self, data: st.DataObject, twice: bool) -> None:
        event = self.inbox.pop(data.draw(st.integers(0, len(self.inbox) - 1)))
        self.post(event)
        if twice and not isinstance(event, EpochTaken):
            self.post(event)

    @rule(is_resumable=st.booleans())
    def submit(self, is_resumable: bool) -> None:
        self.number += 1
        sequence = f"{self.number:016x}"
        self.submitted[self.number] = sequence
        request = make_request(sequence, max_tokens=MAX_TOKENS)
        if is_resumable:
            request = request.model_copy(update={"resume_state": "{}"})
        self.post(SequenceSubmitted(request, self.number))

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.admitted)))
        self.number += 1
        self.submitted[self.number] = sequence
        self.post(ResumeAsked(ResumeSequence(sequence=sequence, gateway="g1"), self.number))
        assert self.number not in self.submitted, "answered at once"

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.admitted)))
        self.cancelled.add(sequence)
        self.post(CancelAsked(sequence, "the client went away"))

    @precondition(lambda self: any(worker.held for worker in self.workers.values()))
    @rule(is_lost=st.sampled_from((False, False, False, True)))
    def step(self, is_lost: bool) -> None:
        for worker in self.workers.values():
            if worker.assignment is None or worker.phase is not StagePhase.READY:
                continue
            events: list[TokenEvent] = []
            for sequence, tokens in list(worker.held.items()):
                index = len(tokens)
                finish = FinishReason.LENGTH if index + 1 == MAX_TOKENS else None
                tokens.append(true_token(sequence, index))
                events.append(TokenEvent(sequence=sequence, index=index, token=tokens[-1], finish=finish))
                if finish is not None:
                    del worker.held[sequence]
            self.old_steps.append(
                StepTokens(
                    pipeline=worker.assignment.pipeline,
                    epoch=worker.assignment.epoch,
                    step=len(self.old_steps),
                    events=tuple(events),
                )
            )
            if not is_lost:
                self.post(TokensArrived(self.old_steps[-1]))

    @precondition(lambda self: self.old_steps)
    @rule(data=st.data())
    def a_late_step(self, data: st.DataObject) -> None:
        self.post(TokensArrived(data.draw(st.sampled_from(self.old_steps[-6:]))))

    @rule()
    def the_store_forgets(self) -> None:
        self.store.clear()
        self.post(StoreEmptied())

    @rule()
    def the_scheduler_restarts(self) -> None:
        self.inbox.clear()
        self.submitted.clear()  # those who asked hear nothing, and nothing was promised to them
        self.machine = Machine(self.settings)
        stored = tuple(self.store.values())
        pipelines = tuple(self.layouts.values())
        self.post(Restored(Snapshot(epoch=self.epoch, pipelines=pipelines, sequences=stored)))

    # --- what must be true ---

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "machine"):
            return
        books = self.machine.books
        in_layouts: list[str] = []
        for pipeline in books.pipelines.values():
            unformed = (PipelinePhase.WAITING, PipelinePhase.FORMING)
            assert (pipeline.layout is None) == (pipeline.phase in unformed)
            in_layouts += pipeline.layout.workers if pipeline.layout is not None else ()
        assert len(set(in_layouts)) == len(in_layouts), "a worker in two pipelines"
        assert set(books.sequences) <= set(self.store), "what is in the books is in the store"
        for sequence in books.sequences.values():
            assert sequence.generated == [true_token(sequence.id, i) for i in range(len(sequence.generated))]
            assert sequence.id not in self.ended
            if sequence.phase in (SequencePhase.STARTING, SequencePhase.RUNNING):
                layout = books.pipelines[sequence.pipeline or 0].layout
                assert layout is not None and sequence.epoch == layout.epoch
            if sequence.phase is not SequencePhase.SAVING:
                assert list(self.store[sequence.id].tokens) == sequence.generated
        for sequence_id in self.admitted:
            places = (books.sequences, books.ended, self.ended)
            assert sum(sequence_id in place for place in places) == 1, "admitted, and neither kept nor ended"
        self.machine.state(now_s=self.now_s)

    def teardown(self) -> None:
        """When the world behaves again, everything that was admitted ends."""
        if not hasattr(self, "machine"):
            return
        self.workers = {f"n{i}": FakeWorker() for i in range(2)}
        for _ in range(120):
            self.all_load_and_serve()
            if any(worker.held for worker in self.workers.values()):
                self.step(False)
        assert self.machine.books.sequences == {}
        assert self.admitted <= self.ended
        assert self.store == {}
        assert not self.submitted
        assert self.machine.state(now_s=self.now_s).ready
        assert not any(worker.held for worker in self.workers.values())


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerMachine = SchedulerMachine.TestCase
