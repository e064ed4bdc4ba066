"""The one stage that a worker holds: none → loading → ready, or failed with a sentence.

A new assignment ends the present stage first, so that its memory is free before the next one is loaded.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from molink_common.bus import Bus
from molink_common.errors import MolinkError
from molink_common.logs import get_logger
from molink_common.messages import AssignStage, ModelCard, Scheduling, StagePhase, StageReport
from molink_common.telemetry import Telemetry
from molink_stage_worker.batch_plan import BatchLimits
from molink_stage_worker.batching import Batcher
from molink_stage_worker.compute import StageCompute
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from molink_stage_worker.head_desk import HeadDesk
from molink_stage_worker.planning.observation import Demand
from molink_stage_worker.planning.planner import Planner
from molink_stage_worker.sampling import Sampler
from molink_stage_worker.stage_link import CODECS
from molink_stage_worker.stage_runner import StageRunner

log = get_logger("stage-slot")

NEXT: dict[StagePhase, frozenset[StagePhase]] = {
    StagePhase.LOADING: frozenset({StagePhase.READY, StagePhase.FAILED}),
    StagePhase.READY: frozenset({StagePhase.FAILED}),
    StagePhase.FAILED: frozenset(),
}
"""Legal moves of a stage's phase. Whatever the phase, the stage may be dropped."""

_CHECKPOINT_SHARE = 0.5
"""Of the progress of loading: fetching the tensors; the rest is the engine's."""
_BYTES_AN_OPENING_TOKEN = 8
"""In a frame's extra part: up to seven digits and a comma."""


Told = Callable[[str, float | None], None]
"""Told what is being done and the share that is done, None where nobody knows."""


class Checkpoints(Protocol):
    """Where a stage's tensors come from."""

    @property
    def card(self) -> ModelCard:
        """The model."""

    def checkpoint_for(self, first: int, last: int, progress: Told) -> Path:
        """A folder with at least the tensors of layers ``[first, last)``. Blocks; runs in a thread."""


EngineLoader = Callable[[StageSpec, Progress], Engine]


class _Abandoned(Exception):
    """The stage that is being loaded is not wanted any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """What this machine decides about any stage it holds."""

    worker: str
    device: str
    threads: int
    step_tokens: int
    max_running: int


class StageSlot:
    """Holds at most one stage. `on_change` is called when its phase changes."""

    def __init__(
        self,
        *,
        bus: Bus,
        bulk_bus: Bus,
        tasks: asyncio.TaskGroup,
        settings: SlotSettings,
        load_engine: EngineLoader,
        telemetry: Telemetry,
        on_change: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._bulk_bus = bulk_bus
        self._tasks = tasks
        self._settings = settings
        self._load_engine = load_engine
        self._telemetry = telemetry
        self._on_change = on_change
        self._assignment: AssignStage | None = None
        self._phase = StagePhase.LOADING
        self._progress = 0.0
        self._problem: str | None = None
        self._runner: StageRunner | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._abandoned = threading.Event()
        self.released = asyncio.Event()
        """Set while nothing is held."""
        self.released.set()

    @property
    def assignment(self) -> AssignStage | None:
        """What the worker holds or is loading."""
        return self._assignment

    @property
    def runner(self) -> StageRunner | None:
        """The stage at work; None before it is ready."""
        return self._runner if self._phase is StagePhase.READY else None

    def assign(self, assignment: AssignStage, checkpoints: Checkpoints) -> None:
        """Begin to load a stage, whatever was held before. Returns at once."""
        self._drop()
        self._assignment = assignment
        self._phase = StagePhase.LOADING
        self._progress = 0.0
        self._problem = None
        self._abandoned = threading.Event()
        self.released.clear()
        self._task = self._tasks.create_task(self._live(assignment, checkpoints, self._abandoned, set(self._ending)))
        self._on_change()

    def release(self) -> None:
        """Hold nothing. Returns at once; a step that is being computed still ends."""
        if self._assignment is not None:
            self._drop()
            self.released.set()
            self._on_change()

    def report(self) -> StageReport | None:
        """For the heartbeat."""
        held, runner = self._assignment, self._runner
        if held is None:
            return None
        return StageReport(
            pipeline=held.pipeline,
            epoch=held.epoch,
            index=held.index,
            first_layer=held.first_layer,
            last_layer=held.last_layer,
            phase=self._phase,
            progress=self._progress,
            problem=self._problem,
            steps_done=runner.steps_done if runner else 0,
            tokens_done=runner.tokens_done if runner else 0,
            compute_s=runner.compute_s if runner else 0.0,
            frames_dropped=runner.frames_dropped if runner else 0,
            link=runner.link_report() if runner else None,
            head=runner.report() if runner else None,
        )

    def _drop(self) -> None:
        """Let go of what is held. Its task ends in a while."""
        task, self._task = self._task, None
        self._abandoned.set()
        self._assignment = None
        self._runner = None
        if task is not None:
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _enter(self, phase: StagePhase, problem: str | None = None) -> None:
        assert phase in NEXT[self._phase], f"a stage cannot go from {self._phase} to {phase}"
        self._phase = phase
        self._problem = problem
        self._on_change()

    async def _live(
        self,
        assignment: AssignStage,
        checkpoints: Checkpoints,
        abandoned: threading.Event,
        ending: set[asyncio.Task[None]],
    ) -> None:
        if ending:
            await asyncio.wait(ending)
        executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix=f"stage-{assignment.index}",
            initializer=torch.set_num_threads,
            initargs=(self._settings.threads,),
        )
        runner: StageRunner | None = None
        try:
            loop = asyncio.get_running_loop()
            engine = await loop.run_in_executor(executor, self._load, assignment, checkpoints, abandoned, loop)
            runner = self._runner = self._make_runner(assignment, checkpoints.card, engine, executor)
            del engine  # the runner's alone, so that its memory goes with it
            await runner.serve(self._ready)
        except Exception as error:  # whatever it is, the scheduler has to know that this stage is of no use
            if isinstance(error, (MolinkError, MemoryError, torch.OutOfMemoryError)):
                log.error("stage failed", problem=_sentence(error))
            else:
                log.exception("stage failed", problem=_sentence(error))
            if not abandoned.is_set():
                self._runner = None
                self._enter(StagePhase.FAILED, _sentence(error))
        finally:
            # the engine's memory is in use until the thread has ended; the next stage waits for this task
            await asyncio.shield(asyncio.to_thread(executor.shutdown, wait=True, cancel_futures=True))
            runner = None  # the last one to hold the engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(
        self,
        assignment: AssignStage,
        checkpoints: Checkpoints,
        abandoned: threading.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> Engine:
        """In the compute thread. Ends early, with an exception out of `progress`, when nobody wants it any more."""

        def advance(share: float) -> None:
            if abandoned.is_set():
                raise _Abandoned
            loop.call_soon_threadsafe(self._advance, assignment, share)

        card = checkpoints.card
        folder = checkpoints.checkpoint_for(
            assignment.first_layer,
            assignment.last_layer,
            lambda _doing, share: advance((share or 0.0) * _CHECKPOINT_SHARE),
        )
        spec = StageSpec(
            checkpoint=folder,
            first_layer=assignment.first_layer,
            last_layer=assignment.last_layer,
            num_layers=card.num_layers,
            dtype=assignment.dtype,
            device=self._settings.device,
            num_blocks=assignment.num_blocks,
            block_size=assignment.block_size,
        )
        return self._load_engine(spec, lambda share: advance(_CHECKPOINT_SHARE + share * (1 - _CHECKPOINT_SHARE)))

    def _advance(self, assignment: AssignStage, share: float) -> None:
        if self._assignment is assignment:
            self._progress = min(max(share, 0.0), 1.0)

    def _ready(self) -> None:
        self._progress = 1.0
        self._enter(StagePhase.READY)
        log.info("stage ready")

    def _make_runner(
        self, assignment: AssignStage, card: ModelCard, engine: Engine, executor: ThreadPoolExecutor
    ) -> StageRunner:
        is_tail = assignment.index == assignment.num_stages - 1
        sampler = Sampler(eos_token_ids=card.eos_token_ids, vocabulary_size=card.vocabulary_size) if is_tail else None
        return StageRunner(
            bus=self._bus,
            bulk_bus=self._bulk_bus,
            assignment=assignment,
            compute=StageCompute(engine, sampler, codec=CODECS[assignment.codec]),
            executor=executor,
            desk=self._make_desk(assignment, card) if assignment.index == 0 else None,
            telemetry=self._telemetry,
            worker=self._settings.worker,
        )

    def _make_desk(self, assignment: AssignStage, card: ModelCard) -> HeadDesk:
        payload_bytes = self._bus.max_payload_bytes
        token_bytes = assignment.dtype.size_bytes * card.hidden_size
        step_tokens = tokens_in_a_frame(payload_bytes, token_bytes, self._settings.step_tokens)
        if assignment.policy.scheduling is not Scheduling.ADAPTIVE:
            step_tokens = max(step_tokens, card.context_length)  # the baselines compute a prompt as a whole
        planner = Planner(
            num_stages=assignment.num_stages,
            token_bytes=token_bytes,
            step_tokens=step_tokens,
            policy=assignment.policy,
        )
        limits = BatchLimits(
            num_blocks=assignment.num_blocks,
            block_size=assignment.block_size,
            step_tokens=step_tokens,
            max_running=self._settings.max_running,
            opening_tokens=max(payload_bytes // 4 // _BYTES_AN_OPENING_TOKEN, 1),
        )
        batcher = Batcher(limits, planner.plan(Demand(decoding=0, context_tokens=0, prompt_tokens_waiting=0), 0.0))
        return HeadDesk(batcher, planner, token_bytes=token_bytes)


def tokens_in_a_frame(max_payload_bytes: int, bytes_a_token: int, wanted: int) -> int:
    """How many tokens a step may have so that its hidden states take at most six tenths of a message.

    The rest is for what else a frame carries: a quarter for the prompts of sequences that open, tables, slack.
    """
    return max(min(wanted, max_payload_bytes * 6 // 10 // bytes_a_token), 1)


def _sentence(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {error}"
    if isinstance(error, MemoryError):
        return "out of memory while loading the stage"
    return str(error) if isinstance(error, MolinkError) else f"{type(error).__name__}: {error}"
