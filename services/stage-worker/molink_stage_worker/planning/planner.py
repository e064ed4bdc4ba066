"""The head's planner: observations in, a `BatchPlan` out, changed as rarely as pays."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, exp

from molink_common.messages import PipelinePolicy, Scheduling, Speculation
from molink_common.wire import MAX_STEP_TOKENS, Traffic
from molink_stage_worker.batch_plan import BatchPlan
from molink_stage_worker.planning import chunks
from molink_stage_worker.planning.choice import MicroBatchChoice
from molink_stage_worker.planning.cycle import Bottleneck, Cycle, Machine, predict
from molink_stage_worker.planning.cycle_meter import CycleMeter
from molink_stage_worker.planning.observation import Demand, PlannerReport, StepObservation
from molink_stage_worker.planning.pace import PromptPace, alone_s
from molink_stage_worker.planning.published import published_micro_batches
from molink_stage_worker.planning.ring import NO_LINKS, Links, RingEstimator
from molink_stage_worker.planning.stage_cost import StageEstimator
from molink_stage_worker.planning.step_load import StepLoad

WHOLE_PROMPT = MAX_STEP_TOKENS
_PLANS_EVERY_S = 0.25
_DEMAND_CHANGE = 0.25
_THOUGHTS_A_TRY = 6
_PROMPT_SHARE_OVER_S = 3.0
_LEAST_PROMPT_SHARE, _MOST_PROMPT_SHARE = 0.01, 0.7
_PROMPTS_DISTURB = 0.1
"""No count of micro-batches is tried while prompts take a larger share of a stage: they would be measured with it."""
_CHUNKS_OF_A_LONG_PROMPT = 16
_CHUNK_CHANGE, _CHUNK_REST_S = 1.4, 3.0
_CHUNK_JUMP = 2.0
"""So many times the present chunk waits for no rest: a crowd of prompts has come."""


class Planner:
    """Learns from every step that comes back and says how to form the next ones. Not thread-safe; no clock.

    `token_bytes` is what one token's hidden state takes on a link, `step_tokens` the most tokens a step may hold.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        token_bytes: int,
        step_tokens: int,
        policy: PipelinePolicy,
        latency_target_s: float | None = None,
    ) -> None:
        if min(num_stages, token_bytes, step_tokens) < 1:
            raise ValueError("a pipeline has a stage, its tokens have bytes, its steps have tokens")
        self._num_stages = num_stages
        self._token_bytes = token_bytes
        self._step_tokens = step_tokens
        self._policy = policy
        self._latency_target_s = latency_target_s
        self._stages = [StageEstimator() for _ in range(num_stages)]
        self._ring = RingEstimator(links=max(num_stages - 1, 1))
        self._prompt_s = [0.0] * num_stages
        """By stage: seconds of computing for prompts, fading over `_PROMPT_SHARE_OVER_S`; without those that ride."""
        self._riding_tokens = self._decode_tokens = 0.0
        """In decode steps: tokens of prompts, and of those who decode; fading alike."""
        self._prompts_at_s: float | None = None
        self._cycle: Cycle | None = None
        self._plan = self._default_plan()
        self._steady_chunk_tokens = self._plan.chunk_tokens
        self._planned_at_s: float | None = None
        self._planned_for: Demand | None = None
        self._cut_at_s: float | None = None
        self._meter = CycleMeter()
        self._pace = PromptPace()
        self._thoughts = 0
        self._choice = MicroBatchChoice(self._plan.micro_batches)

    def on_step(self, step: StepObservation, now_s: float) -> None:
        """A step came back. Steps of another number of stages (an older pipeline's) or without tokens say nothing."""
        if step.tokens < 1 or not len(step.compute_s) == len(step.waited_s) == self._num_stages:
            return
        self._fade_prompts(now_s)
        self._meter.on_tokens(step.decode_tokens - step.guesses, now_s)
        prompt_tokens = step.tokens - step.decode_tokens
        riding_tokens = prompt_tokens if step.traffic is Traffic.DECODE else 0
        self._riding_tokens += riding_tokens
        self._decode_tokens += step.decode_tokens
        alone = StepLoad(
            tokens=step.tokens,
            prompt_tokens=prompt_tokens,
            sequences=step.sequences,
            context_tokens=step.context_tokens,
        )
        passes = step.passes or (alone,) * self._num_stages
        for index, (stage, load, compute_s) in enumerate(zip(self._stages, passes, step.compute_s, strict=True)):
            if load is None or load.tokens < 1:
                continue
            if load.prompt_tokens > riding_tokens:
                self._prompt_s[index] += self._prompt_part_s(stage, load, riding_tokens, compute_s)
            stage.on_step(
                tokens=load.tokens,
                sequences=load.sequences,
                context_tokens=load.context_tokens,
                compute_s=compute_s,
            )
        if self._num_stages > 1:
            is_decode = step.traffic is Traffic.DECODE and prompt_tokens <= 0
            self._ring.on_step(step, now_s, is_decode=is_decode)

    def on_link(self, rate_bytes_per_s: float | None, round_trip_s: float | None) -> None:
        """What the sender of the head's own link has measured. None: not known."""
        self._ring.on_link(rate_bytes_per_s, round_trip_s)

    def plan(self, demand: Demand, now_s: float) -> BatchPlan:
        """How to form steps now.

        Cheap to call for every step: it thinks again four times a second at most, or when the demand has changed by
        a quarter.
        """
        if self._is_due(demand, now_s):
            self._planned_at_s = now_s
            self._planned_for = demand
            self._plan = self._think(demand, now_s)
        return self._plan

    def report(self) -> PlannerReport:
        """What the planner believes."""
        links = self._links()
        costs = [cost for stage in self._stages if (cost := stage.report()) is not None]
        return PlannerReport(
            cycle_s=None if self._cycle is None else self._cycle.cycle_s,
            bottleneck=self._bottleneck(),
            costs=tuple(costs) if len(costs) == self._num_stages else (),
            link_latency_s=None if links is None else links.latency_s,
            link_s_per_byte=None if links is None else links.s_per_byte,
        )

    # --- deciding --------------------------------------------------------------------------------------------

    def _is_due(self, demand: Demand, now_s: float) -> bool:
        before = self._planned_for
        if before is None or self._planned_at_s is None or now_s - self._planned_at_s >= _PLANS_EVERY_S:
            return True
        changed = abs(demand.decoding - before.decoding)
        return changed > _DEMAND_CHANGE * before.decoding or now_s < self._planned_at_s

    def _think(self, demand: Demand, now_s: float) -> BatchPlan:
        machine = self._machine(now_s)
        match self._policy.scheduling:
            case Scheduling.PLAIN:
                self._predict(machine, demand, self._default_plan().micro_batches)
                return self._default_plan()
            case Scheduling.PUBLISHED:
                micro_batches = self._policy.micro_batches or published_micro_batches(
                    self._stages[0].curve(),
                    sequences=demand.decoding,
                    context_tokens=demand.context_tokens,
                    num_stages=self._num_stages,
                    token_bytes=self._token_bytes,
                    assumed_bytes_per_s=self._policy.assumed_link_bytes_per_s,
                )
                self._predict(machine, demand, micro_batches)
                return replace(self._default_plan(), micro_batches=micro_batches)
            case Scheduling.ADAPTIVE:
                if machine is None:
                    return self._default_plan()
                return self._adapt(machine, demand, now_s)

    def _adapt(self, machine: Machine, demand: Demand, now_s: float) -> BatchPlan:
        self._thoughts += 1
        micro_batches = self._choose_micro_batches(machine, demand, now_s)
        decode_only_s: float | None = None
        if demand.decoding:
            decode_only_s = self._cycle_of(self._without_prompts(machine), demand, micro_batches).cycle_s
        if separate := self._plan.separate_prefill:
            wanted = chunks.separate_chunk_tokens(
                machine,
                step_tokens=self._step_tokens,
                context_tokens=demand.context_tokens,
                cycle_s=decode_only_s,
                crowd=demand.prompts_waiting / max(demand.decoding, 1),
                crowd_tokens=demand.prompt_tokens_waiting,
                queue=self._queue(demand),
                latency_target_s=self._latency_target_s,
            )
        else:
            wanted = chunks.shared_chunk_tokens(
                machine,
                step_tokens=self._step_tokens,
                context_tokens=demand.context_tokens,
                size=_tokens_of(demand, micro_batches),
                latency_target_s=self._latency_target_s,
            )
        is_crowd = demand.prompts_waiting > demand.decoding  # its chunks are cut for it, and gone with it
        chunk_tokens = wanted if is_crowd else self._damped(wanted, now_s)
        along_tokens = riding_tokens = 0
        if separate and demand.decoding:
            along_tokens = chunks.along_tokens(
                machine,
                chunk_tokens=chunk_tokens,
                context_tokens=demand.context_tokens,
                size=_tokens_of(demand, micro_batches),
                tries=self._thoughts % _THOUGHTS_A_TRY == 0,
            )
            if self._cycle is not None:
                riding_tokens = chunks.riding_tokens(
                    machine,
                    cycle=self._cycle,
                    size=_tokens_of(demand, micro_batches),
                    context_tokens=demand.context_tokens,
                    chunk_tokens=chunk_tokens,
                    most=self._step_tokens // 2,
                )
                few = chunks.RIDING_LEAST
                if riding_tokens > few and not self._knows(_tokens_of(demand, micro_batches) + few):
                    riding_tokens = few  # lest many ride for ever, because nobody saw what few would cost
        under_way = chunks.chunks_under_way(
            machine,
            chunk_tokens=along_tokens or chunk_tokens,
            context_tokens=demand.context_tokens,
            cycle=self._cycle if demand.decoding else None,
        )
        return BatchPlan(
            micro_batches=micro_batches,
            chunk_tokens=chunk_tokens,
            chunks_under_way=under_way,
            separate_prefill=separate,
            along_tokens=along_tokens,
            only_along=self._has_time(machine, demand, micro_batches * along_tokens, now_s),
            riding_tokens=riding_tokens,
            draft_price=self._draft_price(machine, demand, micro_batches),
        )

    def _queue(self, demand: Demand) -> float:
        """How many prompts, in lengths of the longest, wait to be computed; those of a few chunks are none."""
        length = max(demand.longest_prompt_tokens, _CHUNKS_OF_A_LONG_PROMPT * self._plan.chunk_tokens)
        return demand.admitted_prompt_tokens / length

    def _has_time(self, machine: Machine, demand: Demand, tokens_a_cycle: int, now_s: float) -> bool:
        """Whether prompts are in time if they only go along with decode steps."""
        return self._pace.has_time(
            waiting_tokens=demand.admitted_prompt_tokens,
            tokens_a_cycle=tokens_a_cycle,
            cycle_s=0.0 if self._cycle is None else self._cycle.cycle_s,
            longest_alone_s=alone_s(machine, prompt_tokens=demand.longest_prompt_tokens, step_tokens=self._step_tokens),
            now_s=now_s,
        )

    def _draft_price(self, machine: Machine, demand: Demand, micro_batches: int) -> float | None:
        """The share that a cycle grows by if every sequence that decodes has one more of its tokens guessed."""
        if self._policy.speculation is Speculation.OFF or not demand.decoding:
            return None
        more = replace(demand, window=demand.window + 1.0)
        now_s = self._cycle_of(machine, demand, micro_batches).cycle_s
        return self._cycle_of(machine, more, micro_batches).cycle_s / now_s - 1.0

    def _damped(self, wanted: int, now_s: float) -> int:
        """The chunk size to have when `wanted` would be best: a new one only now and then, and for a real gain."""
        before = self._steady_chunk_tokens
        is_near = before <= _CHUNK_CHANGE * wanted and wanted <= _CHUNK_CHANGE * before
        is_resting = self._cut_at_s is not None and now_s - self._cut_at_s < _CHUNK_REST_S
        if is_near or (is_resting and wanted < _CHUNK_JUMP * before):
            return before
        self._cut_at_s = now_s
        self._steady_chunk_tokens = wanted
        return wanted

    def _choose_micro_batches(self, machine: Machine, demand: Demand, now_s: float) -> int:
        if self._policy.micro_batches is not None:
            self._predict(machine, demand, self._policy.micro_batches)
            return self._policy.micro_batches
        if demand.decoding == 0:
            self._cycle = None
            return self._plan.micro_batches

        def corrected(count: int) -> Cycle:
            cycle = self._cycle_of(machine, demand, count)
            return replace(cycle, cycle_s=cycle.cycle_s * self._meter.factor(cycle.micro_batches, now_s))

        self._cycle = self._choice.choose(
            decoding=demand.decoding,
            now_s=now_s,
            predict=corrected,
            measured_at_s=self._meter.measured_at_s,
            may_try=max(machine.prompt_shares) < _PROMPTS_DISTURB,
        )
        self._meter.on_plan(
            self._cycle.micro_batches,
            demand.decoding,
            now_s,
            predict_s=lambda count, decoding: (
                self._cycle_of(machine, replace(demand, decoding=decoding), count).cycle_s
            ),
        )
        return self._cycle.micro_batches

    def _predict(self, machine: Machine | None, demand: Demand, micro_batches: int) -> None:
        self._cycle = None if machine is None or not demand.decoding else self._cycle_of(machine, demand, micro_batches)

    def _cycle_of(self, machine: Machine, demand: Demand, micro_batches: int) -> Cycle:
        cycle = predict(
            machine if self._plan.separate_prefill else replace(machine, prompt_shares=(0.0,) * self._num_stages),
            decoding=demand.decoding,
            window=demand.window,
            context_tokens=demand.context_tokens,
            micro_batches=min(micro_batches, demand.decoding),
            chunk_tokens=min(self._plan.along_tokens or self._plan.chunk_tokens, self._step_tokens),
        )
        if self._plan.separate_prefill:
            return cycle
        # a step that holds a prompt delays all that decode alike, however many micro-batches there are
        return replace(cycle, cycle_s=cycle.cycle_s / (1.0 - max(machine.prompt_shares)))

    def _default_plan(self) -> BatchPlan:
        fixed = self._policy.micro_batches
        match self._policy.scheduling:
            case Scheduling.PLAIN:
                return BatchPlan(
                    micro_batches=fixed or 1, chunk_tokens=WHOLE_PROMPT, chunks_under_way=1, separate_prefill=False
                )
            case Scheduling.PUBLISHED:
                return BatchPlan(
                    micro_batches=fixed or self._num_stages,
                    chunk_tokens=WHOLE_PROMPT,
                    chunks_under_way=1,
                    separate_prefill=True,
                )
            case Scheduling.ADAPTIVE:
                sizes = {"step_tokens": self._step_tokens, "token_bytes": self._token_bytes}
                separate = self._num_stages > 1
                return BatchPlan(
                    micro_batches=fixed or self._num_stages,
                    chunk_tokens=chunks.starting_chunk_tokens(**sizes) if separate else self._step_tokens,
                    chunks_under_way=2 * self._num_stages,
                    separate_prefill=separate,
                )

    # --- knowing ---------------------------------------------------------------------------------------------

    def _machine(self, now_s: float) -> Machine | None:
        """What is known. None: too little."""
        curves = [curve for stage in self._stages if (curve := stage.curve()) is not None]
        links = self._links()
        if len(curves) < self._num_stages or links is None:
            return None
        self._fade_prompts(now_s)
        shares = [min(prompt_s / _PROMPT_SHARE_OVER_S, _MOST_PROMPT_SHARE) for prompt_s in self._prompt_s]
        return Machine(
            stages=tuple(curves),
            prompt_shares=tuple(share if share >= _LEAST_PROMPT_SHARE else 0.0 for share in shares),
            riding=self._riding_tokens / max(self._decode_tokens, 1.0),
            token_bytes=self._token_bytes,
            links=links,
            scatter=max(stage.scatter for stage in self._stages),
        )

    def _knows(self, tokens: int) -> bool:
        """Whether every stage has computed steps of about so many tokens."""
        return all(stage.knows(tokens) for stage in self._stages)

    def _links(self) -> Links | None:
        return NO_LINKS if self._num_stages == 1 else self._ring.links()

    def _prompt_part_s(self, stage: StageEstimator, load: StepLoad, riding_tokens: int, compute_s: float) -> float:
        """What the chunks in a pass cost: all, or what decode steps with those that ride in them would not have."""
        others = load.tokens - load.prompt_tokens + riding_tokens
        if others <= 0:
            return compute_s
        curve = stage.curve()
        if curve is None:
            return compute_s * (load.tokens - others) / load.tokens
        context_tokens = load.context_tokens * others // max(load.sequences, 1)
        return max(compute_s - curve.compute_s(others, others, context_tokens), 0.0)

    def _without_prompts(self, machine: Machine) -> Machine:
        return replace(machine, prompt_shares=(0.0,) * self._num_stages, riding=0.0)

    def _fade_prompts(self, now_s: float) -> None:
        before_s = self._prompts_at_s
        self._prompts_at_s = now_s if before_s is None else max(now_s, before_s)
        if before_s is not None and now_s > before_s:
            fade = exp((before_s - now_s) / _PROMPT_SHARE_OVER_S)
            self._prompt_s = [prompt_s * fade for prompt_s in self._prompt_s]
            self._riding_tokens *= fade
            self._decode_tokens *= fade

    def _bottleneck(self) -> str:
        cycle = self._cycle
        if cycle is None:
            return "not known yet"
        match cycle.bottleneck:
            case Bottleneck.STAGE:
                return f"stage {cycle.slowest_stage} computes for the whole cycle"
            case Bottleneck.LINK:
                return "the slowest link sends for the whole cycle"
            case Bottleneck.RING:
                return "the way round the pipeline"


def _tokens_of(demand: Demand, micro_batches: int) -> int:
    """Of the largest micro-batch, guesses included."""
    return ceil(-(-demand.decoding // micro_batches) * demand.window)
