"""The head's door: the scheduler hands sequences over, takes them back, and asks which there are."""

from __future__ import annotations

from collections.abc import Callable

from molink_common import subjects
from molink_common.bus import Bus, Subscription, serve
from molink_common.errors import CapacityError
from molink_common.messages import (
    AskSequences,
    AssignStage,
    Done,
    Failed,
    Message,
    SequencesHeld,
    StartSequence,
    StopSequence,
)
from molink_stage_worker.stage_runner import StageRunner

HeadLookup = Callable[[], tuple[AssignStage, StageRunner] | None]
"""The stage at work, if there is one."""


async def serve_head(bus: Bus, worker: str, at_work: HeadLookup) -> Subscription:
    """Answer on the worker's head subject, whatever stage it holds by then."""

    async def answer(message: Message) -> Message:
        assert isinstance(message, (StartSequence, StopSequence, AskSequences))
        found = at_work()
        if found is None or not found[1].is_head or found[0].pipeline != message.pipeline:
            return Failed(message=f"worker {worker} is not the head of pipeline {message.pipeline} now")
        return _carry_out(message, *found)

    return await serve(bus, subjects.head(worker), answer, StartSequence, StopSequence, AskSequences)


def _carry_out(
    message: StartSequence | StopSequence | AskSequences, assignment: AssignStage, runner: StageRunner
) -> Message:
    match message:
        case StartSequence():
            if message.epoch != assignment.epoch:
                return Failed(message=f"epoch {message.epoch} of the pipeline is not the present one")
            try:
                runner.start(message)
            except (CapacityError, ValueError) as error:
                return Failed(message=str(error))
            return Done()
        case StopSequence():
            runner.stop(message.sequence)
            return Done()
        case AskSequences():
            return SequencesHeld(pipeline=assignment.pipeline, epoch=assignment.epoch, sequences=runner.sequences)
