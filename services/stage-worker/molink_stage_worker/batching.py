"""The head's decisions: which tokens of which sequences make up the next step.

    waiting ── blocks for all its tokens ──▶ running ── finished, stopped, failed ──▶ leaving ──▶ closed
       ▲                                        │
       └────────── out of blocks, step lost ────┘   (computed again from prompt + tokens so far)

Continuous batching with chunked prefill, as the present `BatchPlan` says. A decode step holds at most the share of
one micro-batch, so that every stage has work. Chunks of prompts share steps with decode tokens, or go in steps of
their own, of class bulk, which decode steps may overtake (see `departures`). Chunks of one prompt may be under way in
several steps at once; a decode token has to wait for the one before it. Who decoded longest ago comes first, prompts
by turns in the order of arrival, and admission keeps that order, so nobody starves.
"""

from __future__ import annotations

from bisect import insort

from molink_common.errors import CapacityError
from molink_common.messages import HeadReport, StartSequence, StepTokens
from molink_common.wire import Entry, Logits, Opening, Traffic
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batch_sequence import Sequence, StepUnderWay
from molink_stage_worker.chunk_choice import ChunkChoice
from molink_stage_worker.departures import Departures, Leaving
from molink_stage_worker.kv_blocks import BlockAllocator
from molink_stage_worker.planning.observation import Demand

MAX_RESTARTS_AFTER_LOSS = 10
"""In a row, without a token between; one outage may cost one restart for each stage that was cut off."""


class Batcher:
    """Takes sequences and results, gives steps. Not thread-safe; no IO, no clock."""

    def __init__(self, limits: BatchLimits, plan: BatchPlan) -> None:
        self.plan = plan
        """What the next steps follow; may be replaced at any time."""
        self._limits = limits
        self._blocks = BlockAllocator(limits.num_blocks)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        """By arrival."""
        self._running: dict[str, Sequence] = {}
        """By time of last service, longest ago first."""
        self._departures = Departures()
        self._chunks = ChunkChoice(limits.opening_tokens)
        self._under_way: dict[int, StepUnderWay] = {}
        """By step number, oldest first."""
        self._counts = dict.fromkeys(Traffic, 0)
        """Steps under way, by class."""
        self._decode_steps_in_a_row = 0
        self._failed: list[str] = []
        self._next_step = 1
        self._arrivals = 0
        self._preemptions = 0

    def add(self, start: StartSequence) -> None:
        """Queue a sequence. One that is here already stays as it is.

        Raises:
            CapacityError: the queue is full, or its tokens alone need more blocks than there are.
            ValueError: it has all its tokens already.
        """
        if start.sequence in self._sequences:
            return
        num_tokens = len(start.prompt) + len(start.generated)
        if len(start.generated) >= start.options.max_tokens:
            raise ValueError(f"the sequence has its {start.options.max_tokens} tokens already")
        room = self._limits.num_blocks * self._limits.block_size
        if num_tokens > room:
            raise CapacityError(f"{num_tokens} tokens do not fit into the pipeline's KV memory of {room} tokens")
        if len(self._waiting) >= self._limits.max_waiting:
            raise CapacityError(f"{len(self._waiting)} sequences are waiting already")
        self._arrivals += 1
        sequence = Sequence.starting(start, self._arrivals)
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)

    def stop(self, sequence: str) -> bool:
        """Forget a sequence; a step closes it. False for one that is not here."""
        found = self._sequences.get(sequence)
        if found is not None:
            self._forget(found)
        return found is not None

    def on_tokens(self, tokens: StepTokens) -> None:
        """A step's result. Older steps of its class are lost then, because results of a class come in order.

        A sequence that gets no token from a step that was to give it one is computed again: a stage had to drop
        its part of the step.
        """
        step = self._under_way.get(tokens.step)
        if step is None:
            return
        for older in [number for number in self._under_way if number < tokens.step]:
            if self._under_way[older].traffic is step.traffic:
                self.on_lost(older)
        self._take_off(tokens.step)
        for number in self._departures.step_returned(tokens.step, step.traffic, step.closes):
            self._blocks.release(number)
        missing = dict.fromkeys(step.wanted)
        for event in tokens.events:
            missing.pop(event.sequence, None)
            served = self._present(step, event.sequence)
            if served is None or event.index != len(served.tokens) - len(served.prompt):
                continue
            served.tokens.append(event.token)
            served.restarts = 0
            if event.finish is not None:
                self._forget(served)
        for failed in tokens.failed:
            missing.pop(failed, None)
            served = self._present(step, failed)
            if served is not None:
                self._forget(served)
        for name in missing:
            self._restart(step, name)

    def on_lost(self, step: int) -> None:
        """A step will never come back. Its sequences are computed again; what it closed is closed again."""
        lost = self._take_off(step)
        if lost is None:
            return
        self._departures.step_lost(lost.traffic, lost.closes)
        for name in lost.served:
            self._restart(lost, name)

    def on_all_lost(self) -> None:
        """Nothing that is under way will come back."""
        for step in tuple(self._under_way):
            self.on_lost(step)

    def next_step(self) -> StepPlan | None:
        """The next step, or None: nothing to do, or enough steps are under way."""
        self._admit()
        for traffic in self._turns():
            if chosen := self._choose(traffic):
                return self._commit(chosen, traffic)
        return self._step_without_entries()

    def step_along(self) -> StepPlan | None:
        """A step of prompt chunks to be computed in one pass with the decode step that was just planned."""
        if not self.plan.separate_prefill or self._counts[Traffic.BULK] >= self.plan.chunks_under_way:
            return None
        chosen = self._choose_chunks(0, Traffic.BULK, self.plan.along_tokens)
        return self._commit(chosen, Traffic.BULK) if chosen else None

    def take_failed(self) -> tuple[str, ...]:
        """Sequences given up since the last call: no room for their next token, or lost too often."""
        failed, self._failed = tuple(self._failed), []
        return failed

    def demand(self) -> Demand:
        """What the planner must know of the present load."""
        decoding = [sequence for sequence in self._running.values() if sequence.is_decoding]
        prompts = sum(one.unplanned for one in self._running.values() if not one.is_decoding)
        prompts += sum(one.unplanned for one in self._waiting)
        context = sum(len(one.tokens) for one in decoding)
        return Demand(
            decoding=len(decoding),
            context_tokens=context // len(decoding) if decoding else 0,
            prompt_tokens_waiting=prompts,
        )

    def report(self) -> HeadReport:
        """Numbers for the heartbeat; the age of the oldest step and the plan are for the caller to add."""
        return HeadReport(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._blocks.num_free,
            num_blocks=self._limits.num_blocks,
            steps_under_way=len(self._under_way),
            preemptions=self._preemptions,
        )

    @property
    def sequences(self) -> tuple[str, ...]:
        """Ids of all that are waiting or running."""
        return tuple(self._sequences)

    @property
    def oldest_step(self) -> int | None:
        """Number of the step that has been under way longest."""
        return next(iter(self._under_way), None)

    def check_invariants(self) -> None:
        """Assert what must hold after every event."""
        self._blocks.check_invariants()
        assert len(self._running) <= self._limits.max_running
        assert {sequence.id for sequence in self._waiting} | set(self._running) == set(self._sequences)
        assert len(self._waiting) + len(self._running) == len(self._sequences)
        assert [one.arrival for one in self._waiting] == sorted(one.arrival for one in self._waiting)
        assert self._counts == {kind: sum(one.traffic is kind for one in self._under_way.values()) for kind in Traffic}
        for sequence in self._waiting:
            assert self._blocks.held(sequence.number) == 0 or self._departures.is_leaving(sequence.number)
            assert sequence.planned == 0
            assert not sequence.is_open
        held = sum(self._blocks.held(number) for number in self._departures.numbers)
        for sequence in self._running.values():
            assert not self._departures.is_leaving(sequence.number)
            held += self._blocks.held(sequence.number)
            assert self._blocks.held(sequence.number) >= self._blocks_for(sequence.planned)
        assert held == self._limits.num_blocks - self._blocks.num_free

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)

    def _admit(self) -> None:
        """Let sequences in, in the order of arrival, while their blocks leave one for each that runs."""
        while self._waiting and len(self._running) < self._limits.max_running:
            sequence = self._waiting[0]
            needed = self._blocks_for(len(sequence.tokens))
            if needed > self._limits.num_blocks:
                self._fail(sequence)  # it grew until not even the whole memory holds it
                continue
            # its former life must have left the stages before it starts anew, else a token could be drawn twice
            if self._departures.is_leaving(sequence.number) or self._blocks.num_free - needed < len(self._running):
                return
            del self._waiting[0]
            most = len(sequence.prompt) + sequence.options.max_tokens
            taken = self._blocks.take(sequence.number, needed, expected=self._blocks_for(most))
            sequence.unsent_blocks.extend(taken)
            self._running[sequence.id] = sequence

    def _turns(self) -> tuple[Traffic, ...]:
        """Which classes may have another step, the one whose turn it is first."""
        if not self.plan.separate_prefill:
            return (Traffic.DECODE,) if self._counts[Traffic.DECODE] < self.plan.micro_batches else ()
        classes: tuple[Traffic, ...] = (Traffic.DECODE, Traffic.BULK)
        if self.plan.along_tokens and self._counts[Traffic.DECODE] and not self._has_backlog():
            classes = (Traffic.DECODE,)  # prompts ride along
        elif self._decode_steps_in_a_row >= self.plan.micro_batches and not self.plan.along_tokens:
            classes = (Traffic.BULK, Traffic.DECODE)  # once a cycle: prompts get on however busy the head is
        most = {Traffic.DECODE: self.plan.micro_batches, Traffic.BULK: self.plan.chunks_under_way}
        return tuple(traffic for traffic in classes if self._counts[traffic] < most[traffic])

    def _has_backlog(self) -> bool:
        """Whether prompts would need more than two cycles to ride along."""
        waiting = sum(one.unplanned for one in self._running.values() if not one.is_decoding)
        return waiting > 2 * self.plan.micro_batches * self.plan.along_tokens

    def _choose(self, traffic: Traffic) -> dict[str, int]:
        """How many tokens of whom."""
        chosen: dict[str, int] = {}
        if traffic is Traffic.DECODE:
            self._choose_decode(chosen)
        if traffic is Traffic.BULK or not self.plan.separate_prefill:
            chosen |= self._choose_chunks(len(chosen), traffic, self.plan.chunk_tokens)
        return chosen

    def _choose_decode(self, chosen: dict[str, int]) -> None:
        decoding = sum(sequence.is_decoding for sequence in self._running.values())
        room = self._limits.step_tokens
        ready = next((sequence for sequence in self._running.values() if sequence.unplanned), None)
        if ready is not None and not ready.is_decoding and not self.plan.separate_prefill:
            room -= max(room // 4, 1)  # a prompt has waited longest: many decode sequences must not keep it out
        share = min(-(-decoding // self.plan.micro_batches), room)
        for sequence in list(self._running.values()):
            if len(chosen) >= share:
                break
            if sequence.unplanned and self._may_decode(sequence) and self._make_room(sequence, chosen):
                chosen[sequence.id] = 1

    def _choose_chunks(self, taken: int, traffic: Traffic, most_tokens: int) -> dict[str, int]:
        prompts = [
            sequence
            for sequence in self._running.values()
            if sequence.unplanned
            and not self._may_decode(sequence)
            and self._departures.has_returned(sequence.last_steps, but=traffic)  # classes may overtake each other
        ]
        return self._chunks.choose(prompts, min(self._limits.step_tokens - taken, most_tokens)) if prompts else {}

    def _may_decode(self, sequence: Sequence) -> bool:
        """Whether its next token may go in a decode step. The last token of a prompt may not overtake the others."""
        return sequence.is_decoding and self._departures.has_returned(sequence.last_steps, but=Traffic.DECODE)

    def _make_room(self, sequence: Sequence, chosen: dict[str, int]) -> bool:
        """A block for the sequence's next token, at the expense of the newest if there is no other."""
        if sequence.id not in self._running:
            return False  # it was the newest when another needed room
        needed = self._blocks_for(sequence.planned + 1) - self._blocks.held(sequence.number)
        while needed > self._blocks.num_free:
            if self._departures.numbers:
                return False  # blocks are about to be free
            newest = max(self._running.values(), key=lambda one: one.arrival)
            if newest is sequence and len(self._running) == 1:
                self._fail(sequence)
                return False
            self._preempt(newest)
            chosen.pop(newest.id, None)
            if newest is sequence:
                return False
        if needed > 0:
            sequence.unsent_blocks.extend(self._blocks.take(sequence.number, needed))
        return True

    def _step_without_entries(self) -> StepPlan | None:
        """A step that only closes sequences, or that shows by its return that no lost one is still on its way."""
        for traffic in Traffic:
            if self._departures.awaits(traffic) and not self._counts[traffic]:
                return self._commit({}, traffic)
        # closes alone are worth a step only if no other will carry them soon
        to_close = None if self._under_way else self._departures.class_to_close()
        return None if to_close is None else self._commit({}, to_close)

    def _commit(self, chosen: dict[str, int], traffic: Traffic) -> StepPlan:
        entries: list[Entry] = []
        token_ids: list[int] = []
        opens: list[Opening] = []
        traces: dict[str, str] = {}
        served: dict[str, Sequence] = {}
        step = self._next_step
        self._next_step += 1
        for name, count in chosen.items():
            sequence = self._running.pop(name)
            self._running[name] = served[name] = sequence
            start, end = sequence.planned, sequence.planned + count
            entries.append(
                Entry(
                    sequence=sequence.number,
                    start=start,
                    count=count,
                    opens=not sequence.is_open,
                    logits=Logits.LAST if end == len(sequence.tokens) else Logits.NONE,
                    new_blocks=tuple(sequence.unsent_blocks),
                )
            )
            token_ids.extend(sequence.tokens[start:end])
            if not sequence.is_open:
                sequence.opened_by = step
                opens.append(sequence.opening())
            if sequence.trace is not None:
                traces[name] = sequence.trace
            sequence.unsent_blocks.clear()
            sequence.is_open = True
            sequence.planned = end
            sequence.last_steps[traffic] = step
        closes = self._departures.take_closes(traffic)
        wanted = frozenset(name for name, entry in zip(chosen, entries, strict=True) if entry.logits is not Logits.NONE)
        self._under_way[step] = StepUnderWay(traffic=traffic, served=served, wanted=wanted, closes=closes)
        self._counts[traffic] += 1
        self._decode_steps_in_a_row = 0 if traffic is Traffic.BULK else self._decode_steps_in_a_row + 1
        return StepPlan(
            step=step,
            traffic=traffic,
            entries=tuple(entries),
            token_ids=tuple(token_ids),
            opens=tuple(opens),
            closes=closes,
            traces=traces,
        )

    def _take_off(self, step: int) -> StepUnderWay | None:
        taken = self._under_way.pop(step, None)
        if taken is not None:
            self._counts[taken.traffic] -= 1
        return taken

    def _present(self, step: StepUnderWay, name: str) -> Sequence | None:
        """The sequence that the step served, unless it has gone since (another may have come under its id)."""
        served = step.served.get(name)
        return served if served is not None and self._sequences.get(name) is served else None

    def _restart(self, step: StepUnderWay, name: str) -> None:
        sequence = self._present(step, name)
        if sequence is None or name not in self._running:
            return
        sequence.restarts += 1
        if sequence.restarts > MAX_RESTARTS_AFTER_LOSS:
            self._fail(sequence)
        else:
            self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._leave_stages(sequence)
        insort(self._waiting, sequence, key=lambda one: one.arrival)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id]
        if sequence.id in self._running:
            self._leave_stages(sequence)
        else:
            self._waiting.remove(sequence)

    def _fail(self, sequence: Sequence) -> None:
        self._failed.append(sequence.id)
        self._forget(sequence)

    def _leave_stages(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        leaving = Leaving(
            id=sequence.id,
            number=sequence.number,
            last_steps=dict(sequence.last_steps),
            opened_by=sequence.opened_by if sequence.is_open else None,
        )
        sequence.forget_stages()
        if self._departures.leave(leaving):
            self._blocks.release(leaving.number)
