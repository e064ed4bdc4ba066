"""Whose tokens go into the next step, by the present plan."""

from __future__ import annotations

from collections.abc import Mapping

from molink_common.wire import Traffic
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan
from molink_stage_worker.batch_sequence import Sequence
from molink_stage_worker.chunk_choice import ChunkChoice
from molink_stage_worker.residents import Residents

_LEAST_REBUILDS_UNDER_WAY = 2
"""So that the stage that is rebuilt computes one step while the next one is on its way."""


class StepChoice:
    """Chooses among those who run, and makes room for them. No IO, no clock."""

    def __init__(self, limits: BatchLimits, residents: Residents) -> None:
        self._limits = limits
        self._residents = residents
        self._prompts = ChunkChoice(limits.opening_tokens)
        self._decode_steps_in_a_row = 0

    def on_step(self, traffic: Traffic) -> None:
        """A step of this class was planned."""
        self._decode_steps_in_a_row = 0 if traffic is Traffic.BULK else self._decode_steps_in_a_row + 1

    def turns(self, plan: BatchPlan, counts: Mapping[Traffic, int]) -> tuple[Traffic, ...]:
        """Which classes may have another step, the one whose turn it is first."""
        if not plan.separate_prefill:
            return (Traffic.DECODE,) if counts[Traffic.DECODE] < plan.micro_batches else ()
        classes: tuple[Traffic, ...] = (Traffic.DECODE, Traffic.BULK)
        if plan.along_tokens and counts[Traffic.DECODE] and not self._has_backlog(plan):
            classes = (Traffic.DECODE,)  # prompts ride along
        elif self._decode_steps_in_a_row >= plan.micro_batches and not plan.along_tokens:
            classes = (Traffic.BULK, Traffic.DECODE)  # once a cycle: prompts get on however busy the head is
        most = {Traffic.DECODE: plan.micro_batches, Traffic.BULK: plan.chunks_under_way}
        return tuple(traffic for traffic in classes if counts[traffic] < most[traffic])

    def _has_backlog(self, plan: BatchPlan) -> bool:
        """Whether prompts would need more than two cycles to ride along."""
        waiting = sum(one.unplanned for one in self._residents.running.values() if not one.is_decoding)
        return waiting > 2 * plan.micro_batches * plan.along_tokens

    def tokens(self, plan: BatchPlan, traffic: Traffic) -> dict[str, int]:
        """How many tokens of whom."""
        chosen: dict[str, int] = {}
        if traffic is Traffic.DECODE:
            self._choose_decode(plan, chosen)
        if traffic is Traffic.BULK or not plan.separate_prefill:
            chunks = self.chunks(chosen, traffic, plan.chunk_tokens)
            chosen |= chunks
        return chosen

    def _choose_decode(self, plan: BatchPlan, chosen: dict[str, int]) -> None:
        decoding = sum(sequence.is_decoding for sequence in self._residents.running.values())
        room = self._limits.step_tokens
        ready = next((sequence for sequence in self._residents.running.values() if sequence.unplanned), None)
        if ready is not None and not ready.is_decoding and not plan.separate_prefill:
            room -= max(room // 4, 1)  # a prompt has waited longest: many decode sequences must not keep it out
        share = min(-(-decoding // plan.micro_batches), room)
        for sequence in list(self._residents.running.values()):
            if len(chosen) >= share:
                break
            if sequence.unplanned and self._may_decode(sequence):
                if not self._residents.make_room(sequence, sequence.planned + 1, chosen):
                    continue
                chosen[sequence.id] = 1

    def chunks(self, taken: dict[str, int], traffic: Traffic, most_tokens: int) -> dict[str, int]:
        """How many tokens of whose prompts, beside those `taken`; `taken` loses who has to give way for them."""
        prompts = [
            sequence
            for sequence in list(self._residents.running.values())
            if sequence.unplanned
            and not self._may_decode(sequence)
            and self._may_go_on(sequence, traffic)
            and self._residents.make_room(sequence, len(sequence.tokens), taken)
        ]
        prompts = [sequence for sequence in prompts if sequence.id in self._residents.running]
        return self._prompts.choose(prompts, min(self._limits.step_tokens - len(taken), most_tokens)) if prompts else {}

    def to_rebuild(self, plan: BatchPlan, counts: Mapping[Traffic, int], rebuild: int | None) -> dict[str, int]:
        """The shortest sequences first: most streams go on soonest."""
        if rebuild is None:
            return {}
        if counts[Traffic.BULK] >= max(plan.chunks_under_way, _LEAST_REBUILDS_UNDER_WAY):
            return {}
        lacking = [
            one for one in self._residents.running.values() if one.to_rebuild and self._may_go_on(one, Traffic.BULK)
        ]
        budget = min(self._limits.step_tokens, plan.chunk_tokens)
        chosen: dict[str, int] = {}
        for sequence in sorted(lacking, key=lambda one: (one.to_rebuild, one.arrival)):
            if budget <= 0:
                break
            chosen[sequence.id] = min(budget, sequence.to_rebuild)
            budget -= chosen[sequence.id]
        return chosen

    def _may_decode(self, sequence: Sequence) -> bool:
        """Whether its next token may go in a decode step. The last token of a prompt may not overtake the others."""
        return sequence.is_open and sequence.is_decoding and self._may_go_on(sequence, Traffic.DECODE)

    def _may_go_on(self, sequence: Sequence, traffic: Traffic) -> bool:
        """Whether its next step may go by this class: frames of the other one could be overtaken.

        One that opens again waits for frames of either class, lest an older life reach a stage after the new one.
        """
        return self._residents.departures.has_returned(sequence.last_steps, but=traffic if sequence.is_open else None)
