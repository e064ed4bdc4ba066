"""The head's decisions: which tokens of which sequences make up the next step.

    waiting ── blocks for all its tokens ──▶ running ── finished, stopped, failed ──▶ closed
       ▲                                        │
       └────────── out of blocks, step lost ────┘   (computed again from prompt + tokens so far)

Continuous batching with chunked prefill. A step holds decode tokens first (at most the share of one micro-batch,
so that every stage has work), then chunks of prompts, up to `step_tokens`. Chunks of one prompt may be under way
in several steps at once; a decode token has to wait for the one before it. Whoever was served longest ago comes
first, and admission keeps the order of arrival, so nobody starves.

Blocks of a closed sequence are free at once. That is safe because every stage runs the steps in order and forgets
what a step closes before it runs that step's entries: whoever gets such a block gets it in that step or later.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from molink_common.errors import CapacityError
from molink_common.identity import sequence_number
from molink_common.messages import HeadReport, StartSequence, StepTokens
from molink_common.sampling import SamplingOptions
from molink_common.wire import Entry, Logits, Opening
from molink_stage_worker.batch_plan import BatchLimits, StepPlan
from molink_stage_worker.kv_blocks import BlockAllocator

MAX_RESTARTS_AFTER_LOSS = 10
"""In a row, without a token between; one outage may cost one restart for each stage that was cut off."""


@dataclass(slots=True, eq=False)
class _Sequence:
    id: str
    number: int
    arrival: int
    prompt: tuple[int, ...]
    options: SamplingOptions
    trace: str | None
    tokens: list[int]
    """Prompt and generated."""
    planned: int = 0
    """How many of `tokens` steps have been planned for since it was opened last."""
    steps_under_way: int = 0
    is_open: bool = False
    restarts: int = 0
    unsent_blocks: list[int] = field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        return self.planned > 0 and len(self.tokens) - self.planned <= 1

    @property
    def unplanned(self) -> int:
        return len(self.tokens) - self.planned


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepUnderWay:
    served: dict[str, _Sequence]
    wanted: frozenset[str]
    """Sequences that are to get a token from it."""
    closes: tuple[str, ...]


class Batcher:
    """Takes sequences and results, gives steps. Not thread-safe; no IO, no clock."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._blocks = BlockAllocator(limits.num_blocks)
        self._sequences: dict[str, _Sequence] = {}
        self._waiting: list[_Sequence] = []
        """By arrival."""
        self._running: dict[str, _Sequence] = {}
        """By time of last service, longest ago first."""
        self._under_way: dict[int, _StepUnderWay] = {}
        """By step number, oldest first."""
        self._closes: dict[str, None] = {}
        self._failed: list[str] = []
        self._next_step = 1
        self._arrivals = 0
        self._preemptions = 0

    # --- events ----------------------------------------------------------------------------------------------

    def add(self, start: StartSequence) -> None:
        """Queue a sequence. One that is here already stays as it is.

        Raises:
            CapacityError: the queue is full, or its tokens alone need more blocks than there are.
            ValueError: it has all its tokens already.
        """
        if start.sequence in self._sequences:
            return
        tokens = [*start.prompt, *start.generated]
        if len(start.generated) >= start.options.max_tokens:
            raise ValueError(f"the sequence has its {start.options.max_tokens} tokens already")
        if self._blocks_for(len(tokens)) > self._limits.num_blocks:
            room = self._limits.num_blocks * self._limits.block_size
            raise CapacityError(f"{len(tokens)} tokens do not fit into the pipeline's KV memory of {room} tokens")
        if len(self._waiting) >= self._limits.max_waiting:
            raise CapacityError(f"{len(self._waiting)} sequences are waiting already")
        self._arrivals += 1
        sequence = _Sequence(
            id=start.sequence,
            number=sequence_number(start.sequence),
            arrival=self._arrivals,
            prompt=start.prompt,
            options=start.options,
            trace=start.trace,
            tokens=tokens,
        )
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)

    def stop(self, sequence: str) -> bool:
        """Forget a sequence; the next step closes it. False for one that is not here."""
        found = self._sequences.get(sequence)
        if found is not None:
            self._forget(found)
        return found is not None

    def on_tokens(self, tokens: StepTokens) -> None:
        """A step's result. Older steps under way are lost then, because results come in order.

        A sequence that gets no token from a step that was to give it one is computed again: a stage had to drop
        its part of the step.
        """
        if tokens.step not in self._under_way:
            return
        while (oldest := next(iter(self._under_way))) != tokens.step:
            self.on_lost(oldest)
        step = self._under_way.pop(tokens.step)
        for sequence in step.served.values():
            sequence.steps_under_way -= 1
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
        lost = self._under_way.pop(step, None)
        if lost is None:
            return
        for sequence in lost.served.values():
            sequence.steps_under_way -= 1
        for close in lost.closes:
            reopened = self._sequences.get(close)
            if reopened is None or not reopened.is_open:
                self._closes[close] = None
        for name in lost.served:
            self._restart(lost, name)

    def on_all_lost(self) -> None:
        """Nothing that is under way will come back."""
        for step in list(self._under_way):
            self.on_lost(step)

    # --- decisions -------------------------------------------------------------------------------------------

    def next_step(self) -> StepPlan | None:
        """The next step, or None: nothing to do, or enough steps are under way."""
        if len(self._under_way) >= self._limits.max_steps_under_way:
            return None
        self._admit()
        chosen = self._choose()
        # closes alone are worth a step only if no other will carry them soon
        if not chosen and (not self._closes or self._under_way):
            return None
        return self._commit(chosen)

    def take_failed(self) -> tuple[str, ...]:
        """Sequences given up since the last call: no room for their next token, or lost too often."""
        failed, self._failed = tuple(self._failed), []
        return failed

    def report(self) -> HeadReport:
        """Numbers for the heartbeat; the age of the oldest step is for the caller's clock to add."""
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
        assert len(self._under_way) <= self._limits.max_steps_under_way
        assert {sequence.id for sequence in self._waiting} | set(self._running) == set(self._sequences)
        assert len(self._waiting) + len(self._running) == len(self._sequences)
        assert [one.arrival for one in self._waiting] == sorted(one.arrival for one in self._waiting)
        for sequence in self._waiting:
            assert self._blocks.held(sequence.number) == 0
            assert sequence.planned == 0
            assert not sequence.is_open
        held = 0
        for sequence in self._running.values():
            held += self._blocks.held(sequence.number)
            assert self._blocks.held(sequence.number) >= self._blocks_for(sequence.planned)
            assert sequence.id not in self._closes or not sequence.is_open
        assert held == self._limits.num_blocks - self._blocks.num_free

    # --- how -------------------------------------------------------------------------------------------------

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
            # results of its former life must be in before it starts anew, else a token could be drawn twice
            if sequence.steps_under_way or self._blocks.num_free - needed < len(self._running):
                return
            del self._waiting[0]
            most = len(sequence.prompt) + sequence.options.max_tokens
            sequence.unsent_blocks.extend(
                self._blocks.take(sequence.number, needed, expected=self._blocks_for(most)),
            )
            self._running[sequence.id] = sequence

    def _choose(self) -> dict[str, int]:
        """How many tokens of whom, decode first."""
        chosen: dict[str, int] = {}
        decoding = sum(sequence.is_decoding for sequence in self._running.values())
        room = self._limits.step_tokens
        ready = next((sequence for sequence in self._running.values() if sequence.unplanned), None)
        if ready is not None and not ready.is_decoding:
            room -= max(room // 4, 1)  # a prompt has waited longest: many decode sequences must not keep it out
        share = min(-(-decoding // self._limits.max_steps_under_way), room)
        for sequence in list(self._running.values()):
            if len(chosen) >= share:
                break
            if sequence.is_decoding and sequence.unplanned and self._make_room(sequence, chosen):
                chosen[sequence.id] = 1
        budget = self._limits.step_tokens - len(chosen)
        opening = 0
        for sequence in self._running.values():
            if budget == 0:
                break
            if sequence.is_decoding or not sequence.unplanned:
                continue
            if not sequence.is_open:
                if opening and opening + len(sequence.tokens) > self._limits.opening_tokens:
                    continue
                opening += len(sequence.tokens)
            chosen[sequence.id] = min(budget, sequence.unplanned)
            budget -= chosen[sequence.id]
        return chosen

    def _make_room(self, sequence: _Sequence, chosen: dict[str, int]) -> bool:
        """A block for the sequence's next token, at the expense of the newest if there is no other."""
        if sequence.id not in self._running:
            return False  # it was the newest when another needed room
        needed = self._blocks_for(sequence.planned + 1) - self._blocks.held(sequence.number)
        while needed > self._blocks.num_free:
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

    def _commit(self, chosen: dict[str, int]) -> StepPlan:
        entries: list[Entry] = []
        token_ids: list[int] = []
        opens: list[Opening] = []
        traces: dict[str, str] = {}
        served: dict[str, _Sequence] = {}
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
                opens.append(_opening(sequence))
            if sequence.trace is not None:
                traces[name] = sequence.trace
            sequence.unsent_blocks.clear()
            sequence.is_open = True
            sequence.planned = end
            sequence.steps_under_way += 1
        closes = tuple(self._closes)
        self._closes.clear()
        step = self._next_step
        self._next_step += 1
        wanted = frozenset(name for name, entry in zip(chosen, entries, strict=True) if entry.logits is not Logits.NONE)
        self._under_way[step] = _StepUnderWay(served=served, wanted=wanted, closes=closes)
        return StepPlan(
            step=step,
            entries=tuple(entries),
            token_ids=tuple(token_ids),
            opens=tuple(opens),
            closes=closes,
            traces=traces,
        )

    def _present(self, step: _StepUnderWay, name: str) -> _Sequence | None:
        """The sequence that the step served, unless it has gone since (another may have come under its id)."""
        served = step.served.get(name)
        return served if served is not None and self._sequences.get(name) is served else None

    def _restart(self, step: _StepUnderWay, name: str) -> None:
        sequence = self._present(step, name)
        if sequence is None or name not in self._running:
            return
        sequence.restarts += 1
        if sequence.restarts > MAX_RESTARTS_AFTER_LOSS:
            self._fail(sequence)
        else:
            self._preempt(sequence)

    def _preempt(self, sequence: _Sequence) -> None:
        self._preemptions += 1
        self._leave_stages(sequence)
        insort(self._waiting, sequence, key=lambda one: one.arrival)

    def _forget(self, sequence: _Sequence) -> None:
        del self._sequences[sequence.id]
        if sequence.id in self._running:
            self._leave_stages(sequence)
        else:
            self._waiting.remove(sequence)

    def _fail(self, sequence: _Sequence) -> None:
        self._failed.append(sequence.id)
        self._forget(sequence)

    def _leave_stages(self, sequence: _Sequence) -> None:
        del self._running[sequence.id]
        self._blocks.release(sequence.number)
        if sequence.is_open:
            self._closes[sequence.id] = None
        sequence.is_open = False
        sequence.planned = 0
        sequence.unsent_blocks.clear()


def _opening(sequence: _Sequence) -> Opening:
    # built without validation: the values come from a validated message
    return Opening.model_construct(
        sequence=sequence.id,
        prompt=sequence.prompt,
        generated=tuple(sequence.tokens[len(sequence.prompt) :]),
        options=sequence.options,
    )
