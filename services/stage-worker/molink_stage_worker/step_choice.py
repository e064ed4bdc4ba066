"""Whose tokens go into the next step, by the present plan."""

from __future__ import annotations

from collections.abc import Mapping

from molink_common.wire import Traffic
from molink_stage_worker.batch_plan import BACKLOG_CYCLES, BatchLimits, BatchPlan
from molink_stage_worker.batch_sequence import Sequence
from molink_stage_worker.chunk_choice import ChunkChoice
from molink_stage_worker.residents import Residents

_PART_BESIDE_NEWCOMER = 8
"""While a tenant waits for a first token, those that were served more get this part of a decode step: a step of all
their sequences would delay it by all of their computing, and a token later costs them little."""
_FULL = 0.75
"""Of a micro-batch's share: micro-batches are never quite even."""
_LEAST_REBUILDS_UNDER_WAY = 2
"""So that the stage that is rebuilt computes one step while the next one is on its way."""


class StepChoice:
    """Chooses among those who run, and makes room for them. No IO, no clock."""

    def __init__(self, limits: BatchLimits, residents: Residents) -> None:
        self._limits = limits
        self._residents = residents
        self._prompts = ChunkChoice(limits.opening_tokens, residents.shares)
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

    def is_full(self, plan: BatchPlan, counts: Mapping[Traffic, int]) -> bool:
        """Whether a decode step may go, and would have most of its share; prompts alone where nobody decodes."""
        running = self._residents.running.values()
        decoding = sum(one.is_decoding for one in running)
        if decoding:
            ready = sum(bool(one.unplanned) and self._may_decode(one) for one in running)
            return counts[Traffic.DECODE] < plan.micro_batches and ready >= _FULL * decoding / plan.micro_batches
        waiting = sum(one.unplanned for one in running if self._may_go_on(one, Traffic.BULK))
        most = plan.chunks_under_way if plan.separate_prefill else plan.micro_batches
        return sum(counts.values()) < most and waiting >= plan.chunk_tokens

    def _has_backlog(self, plan: BatchPlan) -> bool:
        """Whether prompts that do not ride would take longer if they only went along with decode steps."""
        if plan.only_along:
            return False
        riding = self._riding(plan)
        waiting = sum(
            one.unplanned for one in self._residents.running.values() if not one.is_decoding and one.id not in riding
        )
        return waiting > BACKLOG_CYCLES * plan.micro_batches * plan.along_tokens

    def _riding(self, plan: BatchPlan) -> frozenset[str]:
        """Whose prompts go in decode steps themselves: who has waited longest, as many as fit into two cycles."""
        running = self._residents.running.values()
        if not plan.separate_prefill or not plan.riding_tokens or not any(one.is_decoding for one in running):
            return frozenset()
        riding: set[str] = set()
        room = BACKLOG_CYCLES * plan.micro_batches * plan.riding_tokens
        for one in running:
            if 0 < one.unplanned <= room and not one.is_decoding and self._may_go_on(one, Traffic.DECODE):
                riding.add(one.id)
                room -= one.unplanned
        return frozenset(riding)

    def tokens(self, plan: BatchPlan, traffic: Traffic) -> dict[str, int]:
        """How many tokens of whom."""
        if traffic is Traffic.BULK:
            return self._apart(plan, plan.chunk_tokens)
        chosen: dict[str, int] = {}
        riding = self._riding(plan)
        self._choose_decode(plan, chosen, riding)
        if not plan.separate_prefill:
            is_urgent = self._newcomer() is not None
            return chosen | self._chunks(chosen, traffic, self._limits.step_tokens if is_urgent else plan.chunk_tokens)
        if riding and chosen:
            return chosen | self._chunks(chosen, traffic, plan.riding_tokens, only=riding)
        return chosen

    def along(self, plan: BatchPlan) -> dict[str, int]:
        """How many tokens of whose prompts for a step to be computed in one pass with a decode step."""
        return self._apart(plan, plan.along_tokens)

    def _apart(self, plan: BatchPlan, most_tokens: int) -> dict[str, int]:
        """Of those prompts that do not go in decode steps themselves."""
        riding = self._riding(plan)
        apart = frozenset(name for name in self._residents.running if name not in riding) if riding else None
        return self._chunks({}, Traffic.BULK, most_tokens, only=apart)

    def _choose_decode(self, plan: BatchPlan, chosen: dict[str, int], riding: frozenset[str]) -> None:
        decoding = sum(sequence.is_decoding for sequence in self._residents.running.values())
        room = self._limits.step_tokens
        ready = next((sequence for sequence in self._residents.running.values() if sequence.unplanned), None)
        if ready is not None and not ready.is_decoding and not plan.separate_prefill:
            room -= max(room // 4, 1)  # a prompt has waited longest: many decode sequences must not keep it out
        if riding:
            room = max(room - plan.riding_tokens, 1)
        share = min(-(-decoding // plan.micro_batches), room)
        newcomer = self._newcomer()
        room_beside_newcomer = max(share // _PART_BESIDE_NEWCOMER, 1)
        for sequence in list(self._residents.running.values()):
            if len(chosen) >= share:
                break
            if sequence.unplanned and self._may_decode(sequence):
                is_served_more = newcomer is not None and self._served(sequence) > newcomer
                if is_served_more and not room_beside_newcomer:
                    continue
                if not self._residents.make_room(sequence, sequence.planned + 1, chosen):
                    continue
                room_beside_newcomer -= is_served_more
                chosen[sequence.id] = 1

    def _newcomer(self) -> int | None:
        """What the tenant served least was served of those whose prompt is to be computed for a first token."""
        if self._residents.shares.num_present < 2:
            return None
        waiting = [
            one for one in self._residents.running.values() if one.unplanned and len(one.tokens) == len(one.prompt)
        ]
        return min(map(self._served, waiting), default=None)

    def _served(self, sequence: Sequence) -> int:
        return self._residents.shares.served(sequence.tenant)

    def _chunks(
        self, taken: dict[str, int], traffic: Traffic, most_tokens: int, only: frozenset[str] | None = None
    ) -> dict[str, int]:
        """How many tokens of whose prompts, beside those `taken`; `taken` loses who has to give way for them."""
        for sequence in self._residents.running.values():
            if sequence.is_new:
                self._residents.look_again(sequence)
        prompts = [
            sequence
            for sequence in list(self._residents.running.values())
            if sequence.unplanned
            and (only is None or sequence.id in only)
            and not self._may_decode(sequence)
            and self._may_go_on(sequence, traffic)
            and self._residents.make_room(sequence, len(sequence.tokens), taken)
        ]
        prompts = [sequence for sequence in prompts if sequence.id in self._residents.running]
        newcomer = self._newcomer()
        if newcomer is not None:  # the tokens of others in its step would delay it
            prompts = [sequence for sequence in prompts if self._served(sequence) <= newcomer] or prompts
        if not prompts:
            return {}
        room = self._limits.step_tokens - len(taken)
        return self._prompts.choose(prompts, min(room, most_tokens), room)

    def to_rebuild(self, plan: BatchPlan, counts: Mapping[Traffic, int], rebuild: int | None) -> dict[str, int]:
        """Who has waited through most losses first; then the shortest: most streams go on soonest."""
        if rebuild is None:
            return {}
        if counts[Traffic.BULK] >= max(plan.chunks_under_way, _LEAST_REBUILDS_UNDER_WAY):
            return {}
        lacking = [
            one for one in self._residents.running.values() if one.to_rebuild and self._may_go_on(one, Traffic.BULK)
        ]
        budget = min(self._limits.step_tokens, plan.chunk_tokens)
        chosen: dict[str, int] = {}
        for sequence in sorted(lacking, key=lambda one: (-one.interruptions, one.to_rebuild, one.arrival)):
            if budget <= 0:
                break
            if not sequence.is_open and self._residents.is_rebuilt_by_others(sequence, chosen):
                continue
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
