"""What the scheduler asks others and waits for. Every question ends in an event, or in nothing to tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import assert_never

from molink_common import messages, subjects
from molink_common.bus import Bus
from molink_common.errors import BusError, NobodyListens, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AskSequences, Done, Failed, Message, ReleaseStage, SequencesHeld
from molink_scheduler.events import (
    AssignAnswered,
    EpochTaken,
    Event,
    PreloadAnswered,
    SequencesHeldArrived,
    StartAnswered,
    WorkerProbed,
)
from molink_scheduler.instructions import (
    AskSequencesOf,
    AssignStageTo,
    PreloadStagesAt,
    ProbeWorker,
    Question,
    ReleaseStageOf,
    StartSequenceAt,
    StopSequenceAt,
    TakeEpoch,
)
from molink_scheduler.lease import Tenure
from molink_scheduler.store import StoreUnavailable

log = get_logger("scheduler.questions")

_ASSIGN_TIMEOUT_S = 5.0
_HEAD_TIMEOUT_S = 2.0
_PROBE_TIMEOUT_S = 1.0
_NO_PIPELINE = 0
"""Pipelines are numbered from 1: to release this one asks nothing of a worker but an answer."""


class Questions:
    """Asks over NATS and the store; `report` is told the answers."""

    def __init__(self, bus: Bus, tenure: Tenure, report: Callable[[Event], None]) -> None:
        self._bus = bus
        self._tenure = tenure
        self._report = report

    async def ask(self, question: Question) -> None:
        """Ask, wait with a bound, and report.

        Raises:
            LeaseLost: another scheduler is active.
        """
        match question:
            case TakeEpoch(above, pipeline):
                await self._take_epoch(above, pipeline)
            case AssignStageTo():
                await self._assign(question)
            case PreloadStagesAt():
                await self._preload(question)
            case ProbeWorker(worker):
                await self._probe(worker)
            case ReleaseStageOf(worker, pipeline):
                await self._tell(subjects.control(worker), ReleaseStage(pipeline=pipeline))
            case StartSequenceAt():
                await self._start(question)
            case StopSequenceAt(worker, stop):
                await self._tell(subjects.head(worker), stop)
            case AskSequencesOf(worker, pipeline):
                await self._ask_sequences(worker, pipeline)
            case _:
                assert_never(question)

    async def _asked(self, subject: str, message: Message, timeout_s: float) -> str | None:
        """None when the other side said `Done`, else the problem."""
        try:
            answer = await self._bus.ask(subject, message, Done, Failed, timeout_s=timeout_s)
        except (BusError, ProtocolError) as error:
            return str(error)
        return answer.message if isinstance(answer, Failed) else None

    async def _tell(self, subject: str, message: Message) -> None:
        problem = await self._asked(subject, message, _HEAD_TIMEOUT_S)
        if problem is not None:
            log.debug("not done", kind=message.TYPE, problem=problem)

    async def _take_epoch(self, above: int, pipeline: int) -> None:
        try:
            epoch = await self._tenure.next_epoch(above)
        except StoreUnavailable as error:
            # the workers refuse what is older than they have seen, so serving on is safe while the lease is ours
            log.warning("an epoch drawn without the store", problem=str(error))
            epoch = above + 1
        self._report(EpochTaken(epoch, pipeline))

    async def _probe(self, worker: str) -> None:
        try:
            question = messages.encode(ReleaseStage(pipeline=_NO_PIPELINE))
            await self._bus.request(subjects.control(worker), question, timeout_s=_PROBE_TIMEOUT_S)
        except NobodyListens:
            self._report(WorkerProbed(worker, False))
        except BusError as error:
            log.debug("a worker does not answer; its heartbeats decide", worker=worker, problem=str(error))
        else:
            self._report(WorkerProbed(worker, True))

    async def _preload(self, instruction: PreloadStagesAt) -> None:
        worker, stages = instruction.worker, instruction.stages
        problem = await self._asked(subjects.control(worker), stages, _ASSIGN_TIMEOUT_S)
        if problem is None:
            log.info("stages to preload", worker=worker, layers=[f"{a}-{b}" for a, b in stages.layers])
        else:
            log.debug("preloading not taken on", worker=worker, problem=problem)
        self._report(PreloadAnswered(worker, problem))

    async def _assign(self, instruction: AssignStageTo) -> None:
        worker, stage = instruction.worker, instruction.stage
        problem = await self._asked(subjects.control(worker), stage, _ASSIGN_TIMEOUT_S)
        log.info(
            "stage assigned" if problem is None else "stage not taken",
            worker=worker,
            pipeline=stage.pipeline,
            epoch=stage.epoch,
            continues_epoch=stage.continues_epoch,
            layers=f"{stage.first_layer}-{stage.last_layer}",
            num_blocks=stage.num_blocks,
            problem=problem,
        )
        self._report(AssignAnswered(worker, stage.epoch, problem))

    async def _start(self, instruction: StartSequenceAt) -> None:
        start = instruction.start
        problem = await self._asked(subjects.head(instruction.worker), start, _HEAD_TIMEOUT_S)
        if problem is not None:
            log.warning("sequence not started", sequence=start.sequence, problem=problem)
        self._report(StartAnswered(start.sequence, start.epoch, problem))

    async def _ask_sequences(self, worker: str, pipeline: int) -> None:
        asked_at_s = asyncio.get_running_loop().time()
        question = AskSequences(pipeline=pipeline)
        try:
            held = await self._bus.ask(subjects.head(worker), question, SequencesHeld, timeout_s=_HEAD_TIMEOUT_S)
        except (BusError, ProtocolError) as error:
            log.warning("the head does not say what it holds", worker=worker, problem=str(error))
            return
        self._report(SequencesHeldArrived(held, asked_at_s))
