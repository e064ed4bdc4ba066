"""The head's books: the batcher, the planner that it follows, and when each step under way was planned."""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.messages import HeadReport, StartSequence, StepTokens
from molink_common.wire import MAX_STEP_TOKENS, Traffic
from molink_stage_worker.batch_plan import StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.planning.observation import StepObservation
from molink_stage_worker.planning.planner import Planner
from molink_stage_worker.planning.step_load import StepLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    plan: StepPlan
    at_s: float


class HeadDesk:
    """Plans steps and learns from their results. No IO; the time is an argument, in seconds."""

    def __init__(self, batcher: Batcher, planner: Planner, *, token_bytes: int) -> None:
        self._batcher = batcher
        self._planner = planner
        self._token_bytes = token_bytes
        self._planned: dict[int, _Planned] = {}
        """By step, oldest first."""
        self._asks_since_s: float | None = None

    @property
    def asks(self) -> bool:
        """Whether nothing is planned but steps that ask if all stages of a new epoch listen.

        Such a step may reach nobody: `on_all_lost` makes room for another.
        """
        return self._batcher.asks

    def use(self, *, can_rewind: bool) -> None:
        """What the stages' engines are able to do (`Engine.can_rewind`)."""
        self._batcher.can_rewind = can_rewind

    @property
    def sequences(self) -> tuple[str, ...]:
        """Ids of all that are waiting or running."""
        return self._batcher.sequences

    def start(self, start: StartSequence) -> None:
        """Raises what `Batcher.add` raises."""
        self._batcher.add(start)

    def stop(self, sequence: str) -> bool:
        """False for one that is not here."""
        return self._batcher.stop(sequence)

    def next_steps(self, now_s: float) -> list[StepPlan]:
        """The steps of the head's next pass, by a plan that fits what was measured so far. None: nothing to do."""
        self._batcher.plan = self._planner.plan(self._batcher.demand(), now_s)
        first = self._batcher.next_step()
        along = self._batcher.step_along() if first is not None and first.traffic is Traffic.DECODE else None
        plans = [plan for plan in (first, along) if plan is not None]
        if plans and self._batcher.asks and self._asks_since_s is None:
            self._asks_since_s = now_s
        self._planned.update((plan.step, _Planned(plan=plan, at_s=now_s)) for plan in plans)
        return plans

    @property
    def has_full_step(self) -> bool:
        """Whether the next step would hold as much as a step may."""
        return self._batcher.has_full_step

    def take_failed(self) -> tuple[str, ...]:
        """Sequences given up since the last call."""
        return self._batcher.take_failed()

    def on_tokens(self, tokens: StepTokens, now_s: float) -> StepObservation | None:
        """A step came back: let its sequences go on. Gives what is to be learnt from it."""
        planned = self._planned.pop(tokens.step, None)
        self._batcher.on_tokens(tokens)
        self._forget_lost()

        if planned is None or not tokens.timings or not planned.plan.entries or planned.plan.rebuild is not None:
            return None
        return self._observation(planned, tokens, now_s)

    def learn(self, observation: StepObservation, now_s: float) -> None:
        """What a step that came back did cost."""
        self._planner.on_step(observation, now_s)

    def on_lost(self, step: int) -> None:
        """A step will never come back."""
        self._batcher.on_lost(step)
        self._forget_lost()

    def on_all_lost(self) -> None:
        """Nothing that is under way will come back."""
        self._batcher.on_all_lost()
        self._planned.clear()

    def on_new_epoch(self, rebuild: int | None) -> None:
        """See `Batcher.on_new_epoch`. To be called when no step of the old epoch can begin to be computed any more."""
        self._batcher.on_new_epoch(rebuild)
        self._planned.clear()
        self._asks_since_s = None

    def on_link(self, rate_bytes_per_s: float | None, round_trip_s: float | None) -> None:
        """What the link to the next stage carries, as its sender has measured it."""
        self._planner.on_link(rate_bytes_per_s, round_trip_s)

    def report(self, now_s: float) -> HeadReport:
        """For the heartbeat."""
        oldest = self._batcher.oldest_step
        planned = None if oldest is None else self._planned.get(oldest)
        since_s = None if planned is None else planned.at_s
        if self._batcher.asks:  # the questions before the present one count too
            since_s = self._asks_since_s
        planner = self._planner.report()
        return self._batcher.report().model_copy(
            update={
                "oldest_step_age_s": 0.0 if since_s is None else now_s - since_s,
                "micro_batches": self._batcher.plan.micro_batches,
                "chunk_tokens": min(self._batcher.plan.chunk_tokens, MAX_STEP_TOKENS),
                "along_tokens": self._batcher.plan.along_tokens,
                "riding_tokens": self._batcher.plan.riding_tokens,
                "separate_prefill": self._batcher.plan.separate_prefill,
                "cycle_s": planner.cycle_s,
                "costs": planner.costs,
            }
        )

    def _observation(self, planned: _Planned, tokens: StepTokens, now_s: float) -> StepObservation:
        load = StepLoad.of(planned.plan.entries)
        return StepObservation(
            traffic=planned.plan.traffic,
            tokens=load.tokens,
            sequences=load.sequences,
            context_tokens=load.context_tokens,
            decode_tokens=load.tokens - load.prompt_tokens,
            guesses=sum(map(len, planned.plan.drafts.values())),
            payload_bytes=load.tokens * self._token_bytes,
            compute_s=tuple(compute_us / 1e6 for compute_us, *_ in tokens.timings),
            waited_s=tuple(waited_us / 1e6 for _, waited_us, *_ in tokens.timings),
            ring_s=now_s - planned.at_s,
            passes=tuple(_pass_of(timing) for timing in tokens.timings),
        )

    def _forget_lost(self) -> None:
        """Steps older than the oldest under way have come back or never will."""
        oldest = self._batcher.oldest_step
        for step in [one for one in self._planned if oldest is None or one < oldest]:
            del self._planned[step]


def _pass_of(timing: tuple[int, ...]) -> StepLoad | None:
    _, _, count, prompt_tokens, sequences, context_tokens = timing
    if not count:
        return None
    return StepLoad(tokens=count, prompt_tokens=prompt_tokens, sequences=sequences, context_tokens=context_tokens)
