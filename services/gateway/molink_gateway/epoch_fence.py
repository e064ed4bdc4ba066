"""Which steps' tokens are of a pipeline's present life. Pure.

A worker that was taken for lost may wake up and go on in an epoch that is over. Its tokens would be right to the last
bit only if floats were; so they are dropped. The scheduler takes an old epoch's last tokens until the new one is
ready, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence

from molink_common.messages import PipelineState

_STATES_UNTIL_BELIEVED = 3
"""A scheduler whose Redis was lost may count epochs anew. One state alone may be an old one that came late."""


class EpochFence:
    """The newest epoch of each pipeline."""

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._lower_states: dict[int, int] = {}
        self.num_dropped = 0
        """Steps of epochs that are over."""

    def admits(self, pipeline: int, epoch: int) -> bool:
        """Whether a step of this epoch counts; a newer one than known begins a new life."""
        newest = self._newest.get(pipeline)
        if newest is not None and epoch < newest:
            self.num_dropped += 1
            return False
        self._newest[pipeline] = epoch
        return True

    def hear(self, pipelines: Sequence[PipelineState]) -> None:
        """The scheduler's word. One that is not ready may still have tokens of its last epoch on their way."""
        for told in pipelines:
            newest = self._newest.get(told.pipeline)
            if newest is not None and told.epoch < newest:
                count = self._lower_states.get(told.pipeline, 0) + 1
                self._lower_states[told.pipeline] = count
                if count < _STATES_UNTIL_BELIEVED:
                    continue
            elif not told.ready:
                continue
            self._lower_states.pop(told.pipeline, None)
            self._newest[told.pipeline] = told.epoch
