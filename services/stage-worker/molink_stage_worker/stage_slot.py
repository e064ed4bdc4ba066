"""The one stage that a worker holds: none → loading → ready, or failed with a sentence.

A new assignment ends the present stage first. Its engine goes to a shelf, from where a stage of the same layers takes
it without loading anything. An assignment that continues the present stage in a new epoch keeps all of it but the
runner, which belongs to one epoch: KV blocks, the head's sequences, what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from molink_common.bus import Bus
from molink_common.errors import BusUnavailable, MolinkError
from molink_common.logs import get_logger
from molink_common.memory import collect_all
from molink_common.messages import AssignStage, LayerRange, PreloadStages, StagePhase, StageReport
from molink_common.telemetry import Telemetry
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.engine_shelf import EngineShelf, Held
from molink_stage_worker.journal import DEFAULT_CAPACITY_BYTES
from molink_stage_worker.kept_stage import KeptStage, StageLimits, make_stage, why_not_continued
from molink_stage_worker.preloading import Preloader
from molink_stage_worker.stage_loading import (
    Blocks,
    Checkpoints,
    EngineLoader,
    StageLoader,
    Weights,
)
from molink_stage_worker.stage_runner import StageRunner

log = get_logger("stage-slot")

NEXT: dict[StagePhase, frozenset[StagePhase]] = {
    StagePhase.LOADING: frozenset({StagePhase.READY, StagePhase.FAILED}),
    StagePhase.READY: frozenset({StagePhase.FAILED}),
    StagePhase.FAILED: frozenset(),
}
"""Legal moves of a stage's phase in an epoch. Whatever the phase, the stage may be dropped."""

_OVERHEAD_BYTES = 64 << 20
"""Of the memory that the worker offers: for what is neither weights nor KV blocks."""
_LONGEST_ENDING_S = 30.0
"""For the pass that a former stage is computing; after that the device counts as hung."""
_CONNECT_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """What this machine decides about any stage it holds."""

    worker: str
    device: str
    threads: int
    step_tokens: int
    max_running: int
    journal_bytes: int = DEFAULT_CAPACITY_BYTES
    prefix_cache: bool = True


class StageSlot:
    """Holds at most one stage, and weights beside it. `on_change` is called when anything of this changes."""

    def __init__(
        self,
        *,
        bus: Bus,
        bulk_bus: Bus,
        tasks: asyncio.TaskGroup,
        settings: SlotSettings,
        memory_bytes: int,
        load_engine: EngineLoader,
        telemetry: Telemetry,
        on_change: Callable[[], None],
    ) -> None:
        """`memory_bytes` is for everything: the stage, its KV blocks, and the weights beside it."""
        self._bus = bus
        self._bulk_bus = bulk_bus
        self._tasks = tasks
        self._settings = settings
        self._telemetry = telemetry
        self._on_change = on_change
        self._loader = StageLoader(load_engine=load_engine, device=settings.device)
        self._shelf = EngineShelf(max(memory_bytes - _OVERHEAD_BYTES, 0))
        self._preloader = Preloader(
            shelf=self._shelf,
            loader=self._loader,
            threads=settings.threads,
            tasks=tasks,
            may_load=self._may_preload,
            on_change=on_change,
        )
        self._assignment: AssignStage | None = None
        self._phase = StagePhase.LOADING
        self._progress = 0.0
        self._problem: str | None = None
        self._runner: StageRunner | None = None
        self._serving: asyncio.Task[None] | None = None
        """The runner's work in its epoch."""
        self._task: asyncio.Task[None] | None = None
        """The stage's life, over all of its epochs."""
        self._ending: set[asyncio.Task[None]] = set()
        self._abandoned = threading.Event()
        self._connected = asyncio.Event()
        self.released = asyncio.Event()
        """Set while nothing is held."""
        self.released.set()

    @property
    def assignment(self) -> AssignStage | None:
        """What the worker holds or is loading."""
        return self._assignment

    @property
    def runner(self) -> StageRunner | None:
        """The stage at work; None before it is loaded."""
        return self._runner

    @property
    def preloaded(self) -> tuple[LayerRange, ...]:
        """Of the last order to preload: what is there."""
        return self._preloader.preloaded

    def assign(self, assignment: AssignStage, checkpoints: Checkpoints) -> None:
        """Begin to load a stage, whatever was held before. Returns at once."""
        self._drop()
        self._preloader.yield_to(Weights.of(assignment))
        self._shelf.hold(Held.of(checkpoints.card, assignment))
        self._enter_epoch(assignment, progress=0.0)
        self._abandoned = threading.Event()
        self.released.clear()
        self._task = self._tasks.create_task(self._live(checkpoints, self._abandoned, set(self._ending)))
        self._on_change()

    def continue_in(self, assignment: AssignStage) -> str | None:
        """Go on with the present stage in a new epoch. Returns at once, with a sentence if that cannot be.

        The phase is ready again, in the new epoch, as soon as the stage can be reached: within a round trip.
        """
        problem = why_not_continued(self._assignment, assignment)
        if problem is None and self._serving is None:
            problem = f"epoch {assignment.continues_epoch} cannot be continued: its stage is {self._phase} here"
        if problem is None:
            assert self._serving is not None, "a stage that can be continued has been serving"
            self._enter_epoch(assignment, progress=1.0)
            self._serving.cancel()
        return problem

    def release(self) -> None:
        """Hold nothing. Returns at once; a step that is being computed still ends."""
        if self._assignment is not None:
            self._drop()
            self._shelf.hold(None)
            self.released.set()
            self._on_change()

    def preload(self, order: PreloadStages, checkpoints: Checkpoints) -> None:
        """Have other stages' weights at hand. Returns at once."""
        self._preloader.want(order, checkpoints)

    def close(self) -> None:
        """Hold nothing, load nothing."""
        self._preloader.stop()
        self.release()

    def on_reconnect(self) -> None:
        """The connection is back."""
        self._connected.set()
        if self._runner is not None:
            self._runner.on_cut_off()

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
            pass_age_s=runner.pass_age_s if runner else 0.0,
            longest_pass_s=runner.longest_pass_s if runner else 0.0,
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
        self._serving = None
        if task is not None:
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._has_ended)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        self._on_change()  # its engine may be on the shelf now
        self._preloader.go_on()

    def _may_preload(self) -> bool:
        """Not beside a stage that is loading, nor before it is clear which engines a former stage leaves."""
        return not self._ending and (self._assignment is None or self._phase is not StagePhase.LOADING)

    def _enter_epoch(self, assignment: AssignStage, *, progress: float) -> None:
        self._assignment = assignment
        self._phase = StagePhase.LOADING
        self._progress = progress
        self._problem = None

    def _enter(self, phase: StagePhase, problem: str | None = None) -> None:
        assert phase in NEXT[self._phase], f"a stage cannot go from {self._phase} to {phase}"
        self._phase = phase
        self._problem = problem
        self._on_change()
        self._preloader.go_on()

    async def _live(
        self, checkpoints: Checkpoints, abandoned: threading.Event, ending: set[asyncio.Task[None]]
    ) -> None:
        """A stage from its assignment until it is dropped or fails, in one epoch or several."""
        assignment = self._assignment
        assert assignment is not None, "a stage has been assigned"
        executor = self._make_executor()
        engine: Engine | None = None
        kept: KeptStage | None = None
        is_sound = False
        try:
            await _ended(ending)
            engine = await self._obtain(assignment, checkpoints, executor, abandoned)
            first, last = assignment.first_layer, assignment.last_layer
            folder = partial(checkpoints.checkpoint_for, first, last, lambda _doing, _share: None)
            kept = make_stage(assignment, checkpoints.card, engine, executor, self._limits(), folder)
            is_sound = True
            await self._serve_epochs(kept)
        except Exception as error:  # whatever it is, the scheduler has to know that this stage is of no use
            is_sound = False
            if isinstance(error, (MolinkError, MemoryError, torch.OutOfMemoryError)):
                log.error("stage failed", problem=_sentence(error))
            else:
                log.exception("stage failed", problem=_sentence(error))
            if not abandoned.is_set():
                self._runner = None
                self._serving = None
                self._enter(StagePhase.FAILED, _sentence(error))
        finally:
            # the engine is in use until the thread has ended; the next stage waits for this task
            await asyncio.shield(asyncio.to_thread(executor.shutdown, wait=True, cancel_futures=True))
            if engine is not None and is_sound:
                blocks = Blocks.of(assignment)
                engine.reset(num_blocks=blocks.num_blocks, block_size=blocks.block_size)
                self._shelf.put(Weights.of(assignment), engine)
            engine = kept = None
            if not is_sound:
                collect_all()  # what an exception has passed through may hold on to the engine
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    async def _obtain(
        self,
        assignment: AssignStage,
        checkpoints: Checkpoints,
        executor: ThreadPoolExecutor,
        abandoned: threading.Event,
    ) -> Engine:
        """An engine without sequences: from the shelf, now or once it has been preloaded, or loaded in the thread."""
        weights = Weights.of(assignment)
        blocks = Blocks.of(assignment)
        await self._preloader.ended(weights)
        engine = self._shelf.take(weights)
        if engine is not None:
            log.info("stage taken from the shelf", first_layer=weights.first_layer, last_layer=weights.last_layer)
            engine.reset(num_blocks=blocks.num_blocks, block_size=blocks.block_size)
            return engine
        loop = asyncio.get_running_loop()

        def advance(share: float) -> None:
            loop.call_soon_threadsafe(self._advance, assignment, share)

        def load() -> Engine:
            return self._loader.load(weights, blocks, checkpoints, abandoned=abandoned, advance=advance)

        return await loop.run_in_executor(executor, load)

    async def _serve_epochs(self, kept: KeptStage) -> None:
        """Work in one epoch after the other. Ends by being cancelled, or with what the stage failed by."""
        is_first = True
        while True:
            assignment = self._assignment
            assert assignment is not None, "a stage that is dropped is cancelled"
            if not is_first and kept.desk is not None:
                kept.desk.on_new_epoch(assignment.rebuild)
            is_first = False
            runner = self._runner = StageRunner(
                bus=self._bus,
                bulk_bus=self._bulk_bus,
                assignment=assignment,
                compute=kept.compute,
                executor=kept.executor,
                desk=kept.desk,
                telemetry=self._telemetry,
                worker=self._settings.worker,
                journal=kept.journal,
            )
            serving = self._serving = asyncio.create_task(self._serve(runner))
            try:
                await asyncio.wait({serving})
            finally:
                serving.cancel()  # without effect unless this task itself is cancelled
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({serving})
            if not serving.cancelled():
                serving.result()  # raises: nothing but an error ends it otherwise

    async def _serve(self, runner: StageRunner) -> None:
        """Serve; if the broker is away when the epoch begins, begin once it is back."""
        while True:
            self._connected.clear()
            try:
                await runner.serve(self._ready)
            except BusUnavailable as error:
                if self._phase is not StagePhase.LOADING:
                    raise
                log.warning("stage cannot be reached yet", problem=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CONNECT_AGAIN_S):
                    await self._connected.wait()

    def _advance(self, assignment: AssignStage, share: float) -> None:
        if self._assignment is assignment:
            self._progress = min(max(share, 0.0), 1.0)

    def _ready(self) -> None:
        self._progress = 1.0
        self._enter(StagePhase.READY)
        assert self._assignment is not None, "a stage that is dropped is cancelled"
        log.info("stage ready", epoch=self._assignment.epoch)

    def _make_executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="stage",
            initializer=torch.set_num_threads,
            initargs=(self._settings.threads,),
        )

    def _limits(self) -> StageLimits:
        return StageLimits(
            max_payload_bytes=self._bus.max_payload_bytes,
            step_tokens=self._settings.step_tokens,
            max_running=self._settings.max_running,
            journal_bytes=self._settings.journal_bytes,
            prefix_cache=self._settings.prefix_cache,
        )


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for former stages.

    Raises:
        MolinkError: one of them does not end.
    """
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=_LONGEST_ENDING_S)
        if pending:
            raise MolinkError(f"the device has been computing a step of a former stage for {_LONGEST_ENDING_S:g} s")


def _sentence(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {error}"
    if isinstance(error, MemoryError):
        return "out of memory while loading the stage"
    return str(error) if isinstance(error, MolinkError) else f"{type(error).__name__}: {error}"
