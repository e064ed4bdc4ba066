"""Values and a small driver for the tests of the scheduler's machine."""

from __future__ import annotations

from molink_common.messages import (
    Dtype,
    FinishReason,
    HeadReport,
    Heartbeat,
    LayerRange,
    ModelCard,
    StagePhase,
    StageReport,
    StepTokens,
    SubmitSequence,
    TokenEvent,
)
from molink_common.sampling import SamplingOptions
from molink_scheduler.events import Event, HeartbeatArrived, Restored, Tick
from molink_scheduler.instructions import (
    BroadcastState,
    Instruction,
    NoteLoss,
    PreloadStagesAt,
    ProbeWorker,
    SaveWorker,
)
from molink_scheduler.machine import Machine
from molink_scheduler.records import Snapshot
from molink_scheduler.settings import SchedulerSettings

MIB = 2**20


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
    epoch: int, *events: tuple[str, int, int, FinishReason | None], failed: tuple[str, ...] = ()
) -> StepTokens:
    return StepTokens(
        pipeline=1,
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
) -> StageReport:
    head = HeadReport(
        running=0, waiting=0, free_blocks=1, num_blocks=1, steps_under_way=0, oldest_step_age_s=oldest_step_age_s
    )
    return StageReport(
        pipeline=1,
        epoch=epoch,
        index=index,
        first_layer=layers[0],
        last_layer=layers[1],
        phase=phase,
        problem="no memory" if phase is StagePhase.FAILED else None,
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
