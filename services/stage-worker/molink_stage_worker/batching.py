"""The head's decisions: which tokens of which sequences make up the next step.

Continuous batching with chunked prefill, as the present `BatchPlan` says. A decode step holds at most the share of
one micro-batch, so that every stage has work. Chunks of prompts share steps with decode tokens, or go in steps of
their own, of class bulk, which decode steps may overtake (see `departures`). Chunks of one prompt may be under way in
several steps at once; a decode token has to wait for the one before it. Who decoded longest ago comes first, prompts
by turns in the order of arrival, and admission keeps that order, so nobody starves (see `residents`).

What is lost costs no more than it must:

* *A step is lost.* Its sequences go back to what surely is on every stage and open again there, with the same blocks,
  as soon as no frame of theirs can be on its way any more.
* *A stage is replaced.* In the new epoch the running sequences' tokens go through the pipeline once more, for that
  stage alone (`Extra.rebuild`), the shortest sequence first; then each opens again where it stood.
* *A stage lacks what it should have* (`StepTokens.refused`, or a token that is missing): the sequence is computed anew
  from prompt + tokens so far. So it is where the engine's sequences can only go on.

In a new epoch nothing is known of what other sequences have left in KV blocks (see `prefix_cache`).
"""

from __future__ import annotations

from collections import Counter

from molink_common.messages import HeadReport, StartSequence, StepTokens
from molink_common.wire import Entry, Logits, Opening, Traffic
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batch_sequence import Sequence, Served, StepsUnderWay, StepUnderWay
from molink_stage_worker.chunk_choice import MOST_LOGIT_ROWS
from molink_stage_worker.planning.observation import Demand
from molink_stage_worker.residents import Residents
from molink_stage_worker.speculation import Speculation
from molink_stage_worker.step_choice import StepChoice

MAX_RESTARTS_AFTER_LOSS = 10
"""In a row, without a token between; one outage may cost one restart for each stage that was cut off."""


class Batcher:
    """Takes sequences and results, gives steps. Not thread-safe; no IO, no clock."""

    def __init__(self, limits: BatchLimits, plan: BatchPlan) -> None:
        self.plan = plan
        """What the next steps follow; may be replaced at any time."""
        self._can_rewind = True
        self._limits = limits
        self._residents = Residents(limits)
        self._departures = self._residents.departures
        self._running = self._residents.running
        self._choice = StepChoice(limits, self._residents)
        self._speculation = Speculation(self._residents)
        self._under_way = StepsUnderWay()
        self._next_step = 1
        self._rebuild: int | None = None
        self._asks_since: int | None = None
        """The first step of an epoch that no step has come back of."""
        self._rewinds = self._recomputed = self._rebuilt = 0
        self._opened_tokens = self._cached_tokens = 0

    @property
    def can_rewind(self) -> bool:
        """Whether the stages' engines can open a sequence in its middle (`Engine.can_rewind`)."""
        return self._can_rewind

    @can_rewind.setter
    def can_rewind(self, can: bool) -> None:
        self._can_rewind = can
        self._residents.shares_prefixes = can and self._limits.prefix_secret is not None

    def add(self, start: StartSequence) -> None:
        """Queue a sequence. One that is here already stays as it is.

        Raises:
            CapacityError: the queue is full, or its tokens alone need more blocks than there are.
            ValueError: it has all its tokens already.
        """
        self._residents.add(start)

    def stop(self, sequence: str) -> bool:
        """Forget a sequence; a step closes it. False for one that is not here."""
        found = self._residents.get(sequence)
        if found is not None:
            self._residents.forget(found)
        return found is not None

    def on_tokens(self, tokens: StepTokens) -> None:
        """A step's result. Older steps of its class are lost then, because results of a class come in order.

        A sequence that gets no token from a step that was to give it one is computed anew: a stage had to drop its
        part of the step.
        """
        if self._asks_since is not None and tokens.step >= self._asks_since:
            self._asks_since = None
        step = self._under_way.get(tokens.step)
        if step is None:
            return
        for older in self._under_way.older(tokens.step):
            self.on_lost(older)
        self._under_way.take_off(tokens.step)
        self._residents.step_returned(tokens.step, step.traffic, step.closes)
        self._on_result(step, tokens)

    def on_lost(self, step: int) -> None:
        """A step will never come back. Its sequences go back to what is sure; what it closed is closed again."""
        lost = self._under_way.take_off(step)
        if lost is None:
            return
        self._departures.step_lost(lost.traffic, lost.closes)
        for name in lost.served:
            if (sequence := self._present(lost, name)) is not None:
                self._rewinds += 1
                self._go_back(sequence, anew=False)

    def on_all_lost(self) -> None:
        """Nothing that is under way will come back."""
        for step in self._under_way:
            self.on_lost(step)

    def on_new_epoch(self, rebuild: int | None) -> None:
        """Nothing of an older epoch counts any more, at any stage; stage `rebuild` has empty KV blocks.

        None: all stages may have; everything is computed anew. Until a step has come back, steps only ask whether
        all stages listen.
        """
        for step in self._under_way:
            lost = self._under_way.take_off(step)
            assert lost is not None
            self._departures.step_lost(lost.traffic, lost.closes)
        self._residents.nothing_on_its_way(self._next_step - 1)
        kept: dict[str, int] = {}
        for one in self._running.values():
            one.interruptions += 1
        if rebuild is not None and self.can_rewind:
            for name, one in self._running.items():
                # what a new one begins with was not sent under its name
                if not one.is_new:
                    kept[name] = one.kept if one.kept and rebuild == self._rebuild else one.confirmed
        self._residents.enter_epoch(kept)
        self._rebuild = rebuild
        self._asks_since = self._next_step

    def next_step(self) -> StepPlan | None:
        """The next step, or None: nothing to do, or enough steps are under way."""
        if self.asks:
            return None if self._under_way else self._commit({}, Traffic.DECODE)
        self._residents.admit()
        if self._rebuild is not None:
            self._skip_what_is_rebuilt()
        if chosen := self._choice.to_rebuild(self.plan, self._under_way.counts, self._rebuild):
            return self._commit_rebuild(chosen)
        for traffic in self._choice.turns(self.plan, self._under_way.counts):
            if chosen := self._choice.tokens(self.plan, traffic):
                return self._commit(chosen, traffic)
        return self._step_without_entries()

    def step_along(self) -> StepPlan | None:
        """A step of prompt chunks to be computed in one pass with the decode step that was just planned."""
        if not self.plan.separate_prefill or self._under_way.counts[Traffic.BULK] >= self.plan.chunks_under_way:
            return None
        chosen = self._choice.along(self.plan)
        return self._commit(chosen, Traffic.BULK) if chosen else None

    def take_failed(self) -> tuple[str, ...]:
        """Sequences given up since the last call: no room for their next token, or lost too often."""
        return self._residents.take_failed()

    def demand(self) -> Demand:
        """What the planner must know of the present load."""
        return self._residents.demand(window=self._speculation.window)

    def report(self) -> HeadReport:
        """Numbers for the heartbeat; the age of the oldest step and the plan are for the caller to add."""
        return HeadReport(
            running=len(self._running),
            waiting=self._residents.num_waiting,
            places=self._limits.max_running,
            prompt_tokens_waiting=self.demand().prompt_tokens_waiting,
            free_blocks=self._residents.free_blocks,
            num_blocks=self._limits.num_blocks,
            steps_under_way=len(self._under_way),
            preemptions=self._residents.preemptions,
            rewinds=self._rewinds,
            recomputed=self._recomputed,
            rebuilt=self._rebuilt,
            cached_blocks=self._residents.cached_blocks,
            prefix_queries_tokens=self._opened_tokens,
            prefix_hits_tokens=self._cached_tokens,
            drafted_tokens=self._speculation.drafted,
            accepted_tokens=self._speculation.accepted,
        )

    @property
    def sequences(self) -> tuple[str, ...]:
        """Ids of all that are waiting or running."""
        return self._residents.ids

    @property
    def has_full_step(self) -> bool:
        """Whether `next_step` would give a step that holds as much as the plan allows."""
        return not self.asks and self._rebuild is None and self._choice.is_full(self.plan, self._under_way.counts)

    @property
    def asks(self) -> bool:
        """Whether steps only ask if all stages of a new epoch listen."""
        return self._asks_since is not None

    @property
    def oldest_step(self) -> int | None:
        """Number of the step that has been under way longest."""
        return self._under_way.oldest

    def check_invariants(self) -> None:
        """Assert what must hold after every event."""
        self._residents.check_invariants()
        self._under_way.check_invariants()

    def _on_result(self, step: StepUnderWay, tokens: StepTokens) -> None:
        for name in step.served:
            if name not in tokens.refused:
                self._confirm(step, name)
        gained: Counter[str] = Counter()
        lacking = dict.fromkeys((*step.wanted, *tokens.refused))
        for event in tokens.events:
            sequence = self._known(step, event.sequence)  # whatever its life: a token depends on what is before it only
            if sequence is None or event.index != len(sequence.tokens) - len(sequence.prompt):
                continue
            lacking.pop(event.sequence, None)
            gained[event.sequence] += 1
            sequence.tokens.append(event.token)
            sequence.restarts = sequence.interruptions = 0
            if event.finish is not None:
                self._residents.forget(sequence)
        for name in tokens.failed:
            if (sequence := self._known(step, name)) is not None:
                self._residents.forget(sequence)
        for name, count in gained.items():
            self._speculation.verified(step.served[name], count, in_decode=step.traffic is Traffic.DECODE)
            if count > 1 and (sequence := self._present(step, name)) is not None:
                self._speculation.take_over(sequence, count - 1)
        for name in lacking:
            if (sequence := self._present(step, name)) is not None:
                self._recomputed += 1
                self._go_back(sequence, anew=True)

    def _step_without_entries(self) -> StepPlan | None:
        """A step that only closes sequences, or that shows by its return that no lost one is still on its way."""
        for traffic in Traffic:
            if not self._under_way.counts[traffic] and self._awaits(traffic):
                return self._commit({}, traffic)
        # closes alone are worth a step only if no other will carry them soon
        to_close = None if self._under_way else self._departures.class_to_close()
        return None if to_close is None else self._commit({}, to_close)

    def _awaits(self, traffic: Traffic) -> bool:
        """Whether somebody goes on, or leaves, only when a step of this class has come back."""
        return self._departures.awaits(traffic) or any(
            self._departures.is_awaited(traffic, one.last_steps) for one in self._running.values() if not one.is_open
        )

    def _commit_rebuild(self, chosen: dict[str, int]) -> StepPlan:
        """A step that only the stage to be rebuilt computes.

        It names no more blocks than that stage is to fill. Those behind may be new to some stages, which have to clear
        them: they go with the step that opens the sequence where it stood.
        """
        entries: list[Entry] = []
        for name, count in chosen.items():
            sequence = self._running[name]
            blocks = () if sequence.is_open else self._residents.table(sequence)
            entries.append(
                Entry(
                    sequence=sequence.number,
                    start=sequence.planned,
                    count=count,
                    opens=not sequence.is_open,
                    new_blocks=blocks[: self._residents.blocks_for(sequence.kept)],
                )
            )
        return self._put_under_way(Traffic.BULK, chosen, entries, rebuild=self._rebuild)

    def _commit(self, chosen: dict[str, int], traffic: Traffic) -> StepPlan:
        entries: list[Entry] = []
        token_ids: list[int] = []
        opens: list[Opening] = []
        traces: dict[str, str] = {}
        drafts: dict[str, tuple[int, ...]] = {}
        self._speculation.price = self.plan.draft_price
        room = min(self._limits.step_tokens - sum(chosen.values()), MOST_LOGIT_ROWS - len(chosen))
        for name, count in chosen.items():
            sequence = self._running.pop(name)
            self._running[name] = sequence
            start, end = sequence.planned, sequence.planned + count
            may_guess = self.can_rewind and count == 1 and sequence.is_open and sequence.is_decoding
            guesses = self._speculation.guess(sequence, room) if may_guess else ()
            if guesses:
                drafts[name] = guesses
                room -= len(guesses)
            entries.append(sequence.entry(count, guesses=len(guesses)))
            token_ids += (*sequence.tokens[start:end], *guesses)
            if not sequence.is_open:
                opens.append(sequence.opening())
                if sequence.is_new:
                    self._opened_tokens += len(sequence.tokens)
                    self._cached_tokens += sequence.cached
            if sequence.trace is not None:
                traces[name] = sequence.trace
            sequence.unsent_blocks.clear()
        self._choice.on_step(traffic)
        return self._put_under_way(traffic, chosen, entries, tuple(token_ids), tuple(opens), traces, drafts)

    def _put_under_way(
        self,
        traffic: Traffic,
        chosen: dict[str, int],
        entries: list[Entry],
        token_ids: tuple[int, ...] = (),
        opens: tuple[Opening, ...] = (),
        traces: dict[str, str] | None = None,
        drafts: dict[str, tuple[int, ...]] | None = None,
        rebuild: int | None = None,
    ) -> StepPlan:
        drafts = drafts or {}
        step = self._next_step
        self._next_step += 1
        served: dict[str, Served] = {}
        for name, count in chosen.items():
            sequence = self._running[name]
            if not sequence.is_open:
                sequence.opened_by = step
                sequence.is_open = True
            self._residents.shares.charge(sequence, sequence.planned, sequence.planned + count)
            sequence.planned += count
            sequence.last_steps[traffic] = step
            served[name] = Served(sequence, sequence.life, sequence.planned, len(drafts.get(name, ())))
        closes = self._departures.take_closes(traffic)
        wanted = frozenset(
            name
            for name, entry in zip(chosen, entries, strict=True)
            if entry.logits is not Logits.NONE and self._running[name].planned == len(self._running[name].tokens)
        )
        self._under_way.put(step, StepUnderWay(traffic=traffic, served=served, wanted=wanted, closes=closes))
        return StepPlan(
            step=step,
            traffic=traffic,
            entries=tuple(entries),
            token_ids=token_ids,
            opens=opens,
            closes=closes,
            traces=traces or {},
            drafts=drafts,
            rebuild=rebuild,
        )

    def _known(self, step: StepUnderWay, name: str) -> Sequence | None:
        """The sequence that the step served, unless it has gone since (another may have come under its id)."""
        served = step.served.get(name)
        return served.sequence if served is not None and self._residents.get(name) is served.sequence else None

    def _present(self, step: StepUnderWay, name: str) -> Sequence | None:
        """The sequence that the step served, if it is still at that life."""
        served = step.served.get(name)
        if served is None or served.sequence.life != served.life or name not in self._running:
            return None
        return served.sequence

    def _confirm(self, step: StepUnderWay, name: str) -> None:
        sequence = self._present(step, name)
        if sequence is None:
            return
        sequence.confirmed = step.served[name].end
        self._residents.publish(sequence)
        self._end_rebuild(sequence)

    def _end_rebuild(self, sequence: Sequence) -> None:
        if sequence.kept and sequence.confirmed >= sequence.kept:
            self._rebuilt += 1
            sequence.kept = 0
            sequence.go_back(self._residents.table(sequence))

    def _skip_what_is_rebuilt(self) -> None:
        """What several sequences have in common is rebuilt once."""
        for sequence in self._running.values():
            if sequence.kept and not sequence.is_open:
                self._residents.skip_rebuilt(sequence)
                self._end_rebuild(sequence)

    def _go_back(self, sequence: Sequence, *, anew: bool) -> None:
        """Plan again from what is sure; from the beginning where a stage lacks some of that, or engines cannot."""
        sequence.restarts += 1
        if sequence.restarts > MAX_RESTARTS_AFTER_LOSS:
            self._residents.fail(sequence)
            return
        if anew or not self.can_rewind:
            self._residents.begin_anew(sequence)
        else:
            sequence.go_back(self._residents.table(sequence))
