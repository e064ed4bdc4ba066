"""Values and a small driver for the tests of the scheduler's machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from molink_common.messages import (
    AssignStage,
    Dtype,
    FinishReason,
    HeadReport,
    Heartbeat,
    LayerRange,
    ModelCard,
    Refused,
    StagePhase,
    StageReport,
    StartSequence,
    StepTokens,
    SubmitSequence,
    TokenEvent,
)
from molink_common.sampling import SamplingOptions
from molink_scheduler.events import (
    EpochTaken,
    Event,
    HeartbeatArrived,
    Restored,
    SequenceSaved,
    SequenceSubmitted,
    StartAnswered,
    Tick,
    TokensArrived,
)
from molink_scheduler.instructions import (
    AssignStageTo,
    BroadcastState,
    Instruction,
    NoteLoss,
    PreloadStagesAt,
    ProbeWorker,
    ReplyTo,
    SaveWorker,
)
from molink_scheduler.machine import Machine
from molink_scheduler.records import PipelineRecord, SequenceRecord, Snapshot, StageRecord
from molink_scheduler.settings import SchedulerSettings

MIB = 2**20
S1, S2 = "00000000000000a1", "00000000000000a2"
HALVES = ((0, 2), (2, 4))


def make_card(*, num_layers: int = 4, fingerprint: str = "f" * 16, context_length: int = 512) -> ModelCard:
    return ModelCard(
        name="Tiny",
        aliases=("demo",),
        fingerprint=fingerprint,
        family="llama",
        packed=True,
        num_layers=num_layers,
        hidden_size=8,
        vocabulary_size=100,
        context_length=context_length,
        checkpoint_dtype="float32",
        layer_parameters=(1000,) * num_layers,
        embedding_parameters=800,
        output_parameters=800,
        kv_scalars_per_token=(16,) * num_layers,
    )


def make_heartbeat(
    worker: str,
    *,
    stage: StageReport | None = None,
    card: ModelCard | None = None,
    problem: str | None = None,
    leaving: bool = False,
    memory_bytes: int = 10 * MIB,
    preparing: str | None = None,
    preloaded: tuple[LayerRange, ...] = (),
    site: str = "default",
) -> Heartbeat:
    return Heartbeat(
        worker=worker,
        version="test",
        device="cpu",
        device_name="fake",
        native_dtypes=(Dtype.FLOAT32,),
        memory_bytes=memory_bytes,
        card=None if preparing is not None else card or make_card(),
        preparing=preparing,
        problem=problem,
        leaving=leaving,
        stage=stage,
        preloaded=preloaded,
        site=site,
    )


def make_request(sequence: str, *, gateway: str = "g1", max_tokens: int = 10, model: str = "demo") -> SubmitSequence:
    return SubmitSequence(
        sequence=sequence,
        gateway=gateway,
        request=f"req-{sequence[-4:]}",
        model=model,
        prompt=(1, 2, 3),
        options=SamplingOptions(max_tokens=max_tokens),
    )


def make_settings(**changes: object) -> SchedulerSettings:
    return SchedulerSettings.model_validate({"stage_overhead_bytes": 0, "stages": 2, **changes})


def make_step(
    epoch: int,
    *events: tuple[str, int, int, FinishReason | None],
    failed: tuple[str, ...] = (),
    pipeline: int = 1,
) -> StepTokens:
    return StepTokens(
        pipeline=pipeline,
        epoch=epoch,
        step=0,
        events=tuple(TokenEvent(sequence=s, index=i, token=t, finish=f) for s, i, t, f in events),
        failed=failed,
    )


def make_stage(
    epoch: int,
    index: int,
    layers: tuple[int, int],
    phase: StagePhase = StagePhase.READY,
    *,
    oldest_step_age_s: float = 0,
    pass_age_s: float = 0,
    longest_pass_s: float = 0,
    pipeline: int = 1,
) -> StageReport:
    head = HeadReport(
        running=0, waiting=0, free_blocks=1, num_blocks=1, steps_under_way=0, oldest_step_age_s=oldest_step_age_s
    )
    return StageReport(
        pipeline=pipeline,
        epoch=epoch,
        index=index,
        first_layer=layers[0],
        last_layer=layers[1],
        phase=phase,
        problem="no memory" if phase is StagePhase.FAILED else None,
        pass_age_s=pass_age_s,
        longest_pass_s=longest_pass_s,
        head=head if index == 0 else None,
    )


QUIET = (SaveWorker, BroadcastState, NoteLoss, ProbeWorker, PreloadStagesAt)
"""What would stand in every list. Tests of these find them in `Driver.all`."""


class Driver:
    """A machine with a hand on its clock. `QUIET` instructions are left out of the lists."""

    def __init__(self, settings: SchedulerSettings | None = None, snapshot: Snapshot | None = None) -> None:
        self.machine = Machine(settings or make_settings())
        self.now_s = 100.0
        self.all: list[Instruction] = []
        self.do(Restored(snapshot or Snapshot()))

    def do(self, event: Event, *, after_s: float = 0.0) -> list[Instruction]:
        self.now_s += after_s
        instructions = self.machine.handle(event, now_s=self.now_s)
        self.all += instructions
        return [one for one in instructions if not isinstance(one, QUIET)]

    def beat(self, *heartbeats: Heartbeat) -> list[Instruction]:
        return [one for beat in heartbeats for one in self.do(HeartbeatArrived(beat))]

    def wait(self, seconds: float, *, beats: tuple[Heartbeat, ...] = (), tick_s: float = 0.5) -> list[Instruction]:
        """Let time pass, with ticks, and with these heartbeats at each of them."""
        done: list[Instruction] = []
        end_s = self.now_s + seconds
        while self.now_s < end_s - 1e-9:
            self.now_s = min(self.now_s + tick_s, end_s)
            done += self.beat(*beats)
            done += self.do(Tick())
        return done


def beats_of(epoch: int, *workers: str) -> tuple[Heartbeat, ...]:
    return tuple(make_heartbeat(w, stage=make_stage(epoch, k, HALVES[k])) for k, w in enumerate(workers))


def layout_of(epoch: int, *workers: str) -> PipelineRecord:
    return PipelineRecord(
        pipeline=1,
        epoch=epoch,
        card=make_card(),
        dtype=Dtype.FLOAT32,
        num_blocks=8192 if len(workers) == 2 else 4096,
        block_size=16,
        stages=tuple(
            StageRecord(worker=w, first_layer=a, last_layer=b) for w, (a, b) in zip(workers, HALVES, strict=True)
        ),
    )


def assign(epoch: int, worker: str, index: int, num_blocks: int) -> AssignStageTo:
    stage = AssignStage(
        pipeline=1,
        epoch=epoch,
        fingerprint="f" * 16,
        index=index,
        num_stages=2,
        first_layer=HALVES[index][0],
        last_layer=HALVES[index][1],
        dtype=Dtype.FLOAT32,
        num_blocks=num_blocks,
        block_size=16,
    )
    return AssignStageTo(worker, stage)


def start_of(sequence: str, epoch: int, generated: tuple[int, ...] = (), *, interruptions: int = 0) -> StartSequence:
    request = make_request(sequence)
    return StartSequence(
        pipeline=1,
        epoch=epoch,
        sequence=sequence,
        prompt=request.prompt,
        generated=generated,
        options=request.options,
        interruptions=interruptions,
    )


def record_of(sequence: str, started_epoch: int | None = None) -> SequenceRecord:
    return SequenceRecord(request=make_request(sequence), fingerprint="f" * 16, started_epoch=started_epoch)


def ready_driver(*standbys: str) -> Driver:
    """Two stages at work; these workers have come after them."""
    driver = Driver()
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.do(EpochTaken(1))
    driver.beat(*beats_of(1, "w1", "w2"), *(make_heartbeat(name) for name in standbys))
    assert driver.machine.state(now_s=driver.now_s).ready
    return driver


def running_driver(*standbys: str) -> Driver:
    """One sequence with one token, in epoch 1."""
    driver = ready_driver(*standbys)
    run_sequence(driver, make_request(S1))
    return driver


def run_sequence(driver: Driver, request: SubmitSequence) -> None:
    """Have it at work, with the token 11."""
    driver.do(SequenceSubmitted(request, 7))
    driver.do(SequenceSaved(request.sequence))
    driver.do(StartAnswered(request.sequence, 1))
    driver.do(TokensArrived(make_step(1, (request.sequence, 0, 11, None))))


def refusal(done: list[Instruction]) -> Refused:
    """What a submission was answered."""
    assert len(done) == 1 and isinstance(done[0], ReplyTo)
    assert isinstance(done[0].message, Refused)
    return done[0].message


@dataclass
class FakeWorker:
    is_alive: bool = True
    is_leaving: bool = False
    assignment: AssignStage | None = None
    phase: StagePhase = StagePhase.LOADING
    held: dict[str, list[int]] = field(default_factory=dict)
    """As the head: each sequence with its tokens so far."""
    preloaded: tuple[LayerRange, ...] = ()
