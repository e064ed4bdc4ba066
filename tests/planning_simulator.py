"""A pipeline with a virtual clock, for the micro-batch planner: stages, links and sequences that never end.

    head plans ─▶ stage 0 ─▶ link (rate, delay) ─▶ stage 1 ─▶ … ─▶ tail ─▶ delay ─▶ head

The head plans as `batching` does, a chunk of a prompt along with a decode step too. A stage takes from the product's
own ready queue, waits for company by its rhythm, and computes one pass for what pays together: a pass costs what its
tokens together cost, and each of its steps goes on when it ends. Links serve decode before bulk with every fourth
turn for bulk; a bulk frame crosses a link in pieces. All times scatter.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from molink_common.messages import PipelinePolicy
from molink_common.wire import Traffic
from molink_stage_worker.batch_plan import BatchPlan
from molink_stage_worker.company import DecodeRhythm
from molink_stage_worker.planning import Demand, Planner, StepObservation
from molink_stage_worker.planning.stage_cost import StageCurve, StageEstimator
from molink_stage_worker.planning.step_load import StepLoad, pays_together
from molink_stage_worker.ready_queue import ReadyQueue
from tests.planning_machines import Cost, Wire

CONTEXT_TOKENS = 60
"""Of a sequence that decodes."""
PIECE_BYTES = 32 * 1024
STEP_TOKENS = 256


@dataclass(slots=True, eq=False)
class _Prompt:
    at_s: float
    tokens: int
    planned: int = 0
    goes_apart: bool = False
    """It has begun in steps of its own."""

    @property
    def rest(self) -> int:
        return self.tokens - self.planned


@dataclass(slots=True, eq=False)
class _Step:
    traffic: Traffic
    planned_at_s: float
    sequences: list[int]
    prompt: _Prompt | None = None
    prompt_tokens: int = 0
    ends_prompt: bool = False
    load: StepLoad = field(default_factory=lambda: StepLoad.of(()))
    arrived_at_s: float = 0.0
    bytes_left: int = 0
    compute_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    passes: list[StepLoad | None] = field(default_factory=list)

    def close(self) -> None:
        """Everything is in it."""
        decoding = len(self.sequences)
        self.load = StepLoad(
            tokens=decoding + self.prompt_tokens,
            prompt_tokens=self.prompt_tokens,
            sequences=decoding + (self.prompt is not None),
            context_tokens=CONTEXT_TOKENS * decoding + (self.prompt.planned if self.prompt else 0),
        )


class _Stage:
    """What `StageRunner` and `StageCompute` decide of a stage, without frames and threads."""

    _ALWAYS_TOKENS, _TRY_TOKENS, _REFUSALS_A_TRY, _PASSES_A_CURVE = 8, 32, 16, 8

    def __init__(self) -> None:
        self.ready: ReadyQueue[_Step] = ReadyQueue()
        self.is_busy = False
        self._rhythm = DecodeRhythm()
        self._last_decode: _Step | None = None
        self._cost = StageEstimator()
        self._curve: StageCurve | None = None
        self._passes = 0
        self._refusals = 0

    def put(self, step: _Step, now_s: float) -> float:
        """How long it waits for company."""
        patience_s = 0.0
        if step.traffic is Traffic.DECODE:
            self._rhythm.on_decode(now_s)
            self._last_decode = step
        elif self._last_decode is not None and self.pays_together([self._last_decode], step):
            patience_s = self._rhythm.patience_s(now_s)
        self.ready.put(step, step.traffic, alone_from_s=now_s + patience_s)
        return patience_s

    def pays_together(self, steps: Sequence[_Step], other: _Step) -> bool:
        if other.prompt is not None and any(step.prompt is other.prompt for step in steps):
            return False
        if other.load.tokens <= self._ALWAYS_TOKENS:
            return True
        if pays_together(self._curve, StepLoad.together(step.load for step in steps), other.load):
            return True
        self._refusals += 1
        return other.load.tokens <= self._TRY_TOKENS and self._refusals % self._REFUSALS_A_TRY == 0

    def on_pass(self, load: StepLoad, compute_s: float) -> None:
        self._cost.on_step(
            tokens=load.tokens, sequences=load.sequences, context_tokens=load.context_tokens, compute_s=compute_s
        )
        self._passes += 1
        if self._passes % self._PASSES_A_CURVE == 0:
            self._curve = self._cost.curve()


class _Sending:
    """Decode before bulk; every fourth turn, if both wait, is bulk's."""

    def __init__(self) -> None:
        self.waiting: dict[Traffic, deque[_Step]] = {traffic: deque() for traffic in Traffic}
        self.is_busy = False
        self.turn = 0

    def next(self) -> deque[_Step] | None:
        decode, bulk = self.waiting[Traffic.DECODE], self.waiting[Traffic.BULK]
        if decode and bulk:
            self.turn += 1
            return bulk if self.turn % 4 == 0 else decode
        return decode or bulk or None


class Pipeline:
    """`sequences` decode for ever; `run` may be called again, and stages and wire be changed in between."""

    def __init__(
        self,
        stages: list[Cost],
        wire: Wire,
        *,
        sequences: int,
        token_bytes: int = 16 * 1024,
        micro_batches: int | None = None,
        link_is_measured: bool = True,
        noise: float = 0.15,
        seed: int = 1,
        slowed: float = 0.0,
    ) -> None:
        self.stages = stages
        self.wire = wire
        self.now_s = 0.0
        self.counts: list[tuple[float, int]] = []
        """When which count of micro-batches began."""
        self.plan: BatchPlan | None = None
        self.gaps_s: list[tuple[float, float]] = []
        """When a sequence got a token, and how long after the one before."""
        self.first_tokens_s: list[float] = []
        self.planner = Planner(
            num_stages=len(stages),
            token_bytes=token_bytes,
            step_tokens=STEP_TOKENS,
            policy=PipelinePolicy(micro_batches=micro_batches),
        )
        self._token_bytes = token_bytes
        self._link_is_measured = link_is_measured
        self._noise = noise
        self._slowed = slowed
        """The share by which a stage is slower for each other that computes: they share cores."""
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._computing = [_Stage() for _ in stages]
        self._sending = [_Sending() for _ in stages[1:]]
        self._ready = deque(range(sequences))
        self._last_s: dict[int, float] = {}
        self._sequences = sequences
        self._under_way = dict.fromkeys(Traffic, 0)
        self._prompts: deque[_Prompt] = deque()
        self._decode_steps_in_a_row = 0
        self._at(0.0, self._pump)

    def run(self, until_s: float) -> Pipeline:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        return self

    def prompts_every(self, interval_s: float, tokens: int) -> None:
        def arrive() -> None:
            self._prompts.append(_Prompt(self.now_s, tokens))
            self._at(interval_s, arrive)
            self._pump()

        self._at(interval_s, arrive)

    def tokens_per_s(self, since_s: float) -> float:
        return sum(at_s >= since_s for at_s, _ in self.gaps_s) / (self.now_s - since_s)

    def gap_s(self, share: float, since_s: float) -> float:
        gaps_s = sorted(gap_s for at_s, gap_s in self.gaps_s if at_s >= since_s)
        return gaps_s[int(share * (len(gaps_s) - 1))]

    def changes(self, since_s: float) -> int:
        return sum(at_s >= since_s for at_s, _ in self.counts[1:])

    # --- the head --------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._computing[0].is_busy:
            return
        plan = self._plan()
        first = next((step for traffic in self._turns(plan) if (step := self._next_step(plan, traffic))), None)
        if first is None:
            return
        steps = [first]
        goes_along = first.traffic is Traffic.DECODE and plan.separate_prefill and plan.along_tokens > 0
        apart = self._apart(plan)
        if goes_along and apart and self._under_way[Traffic.BULK] < plan.chunks_under_way:
            steps.append(self._step(Traffic.BULK, [], apart[0], plan.along_tokens))
        self._compute(0, steps)

    def _riding(self, plan: BatchPlan) -> list[_Prompt]:
        """`StepChoice._riding`."""
        riding, room = [], 2 * plan.micro_batches * plan.riding_tokens
        for prompt in self._prompts:
            if not prompt.goes_apart and prompt.rest <= room:
                riding.append(prompt)
                room -= prompt.rest
        return riding

    def _apart(self, plan: BatchPlan) -> list[_Prompt]:
        riding = self._riding(plan)
        return [prompt for prompt in self._prompts if prompt not in riding]

    def _turns(self, plan: BatchPlan) -> list[Traffic]:
        """`StepChoice.turns`."""
        classes = [Traffic.DECODE]
        if plan.separate_prefill:
            goes_along = bool(plan.along_tokens) and self._under_way[Traffic.DECODE] > 0
            waiting = sum(prompt.rest for prompt in self._apart(plan))
            has_backlog = not plan.only_along and waiting > 2 * plan.micro_batches * plan.along_tokens
            if not goes_along or has_backlog:
                classes.append(Traffic.BULK)
            if self._decode_steps_in_a_row >= plan.micro_batches and not plan.along_tokens:
                classes.reverse()
        most = {Traffic.DECODE: plan.micro_batches, Traffic.BULK: plan.chunks_under_way}
        return [traffic for traffic in classes if self._under_way[traffic] < most[traffic]]

    def _next_step(self, plan: BatchPlan, traffic: Traffic) -> _Step | None:
        if traffic is Traffic.BULK:
            apart = self._apart(plan)
            return self._step(traffic, [], apart[0], plan.chunk_tokens) if apart else None
        shares = bool(self._prompts) and not plan.separate_prefill
        if not self._ready and not shares:
            return None
        most = min(-(-self._sequences // plan.micro_batches), len(self._ready))
        chosen = [self._ready.popleft() for _ in range(most)]
        if shares:
            return self._step(traffic, chosen, self._prompts[0], min(plan.chunk_tokens, STEP_TOKENS - most))
        riding = self._riding(plan)
        return self._step(traffic, chosen, riding[0] if riding else None, plan.riding_tokens)

    def _step(self, traffic: Traffic, sequences: list[int], prompt: _Prompt | None, most_prompt_tokens: int) -> _Step:
        step = _Step(traffic, self.now_s, sequences, prompt, arrived_at_s=self.now_s)
        if prompt is not None:
            prompt.goes_apart |= traffic is Traffic.BULK
            step.prompt_tokens = min(prompt.rest, most_prompt_tokens)
            prompt.planned += step.prompt_tokens
            if prompt.planned == prompt.tokens:
                step.ends_prompt = True
                self._prompts.remove(prompt)
        step.close()
        self._under_way[traffic] += 1
        self._decode_steps_in_a_row = 0 if traffic is Traffic.BULK else self._decode_steps_in_a_row + 1
        return step

    def _plan(self) -> BatchPlan:
        waiting = sum(prompt.rest for prompt in self._prompts)
        demand = Demand(
            decoding=self._sequences,
            context_tokens=CONTEXT_TOKENS,
            prompt_tokens_waiting=waiting,
            admitted_prompt_tokens=waiting,
            longest_prompt_tokens=max((prompt.tokens for prompt in self._prompts), default=0),
            prompts_waiting=len(self._prompts),
        )
        self.plan = self.planner.plan(demand, self.now_s)
        if not self.counts or self.counts[-1][1] != self.plan.micro_batches:
            self.counts.append((self.now_s, self.plan.micro_batches))
        return self.plan

    def _back(self, step: _Step) -> None:
        self._under_way[step.traffic] -= 1
        for sequence in step.sequences:
            if sequence in self._last_s:
                self.gaps_s.append((self.now_s, self.now_s - self._last_s[sequence]))
            self._last_s[sequence] = self.now_s
            self._ready.append(sequence)
        if step.ends_prompt and step.prompt is not None:
            self.first_tokens_s.append(self.now_s - step.prompt.at_s)
        observation = StepObservation(
            traffic=step.traffic,
            tokens=step.load.tokens,
            sequences=step.load.sequences,
            context_tokens=step.load.context_tokens,
            decode_tokens=len(step.sequences),
            payload_bytes=step.load.tokens * self._token_bytes,
            compute_s=tuple(step.compute_s),
            waited_s=tuple(step.waited_s),
            ring_s=self.now_s - step.planned_at_s,
            passes=tuple(step.passes),
        )
        self.planner.on_step(observation, self.now_s)
        if self._link_is_measured:
            self.planner.on_link(self.wire.rate_bytes_per_s, self.wire.round_trip_s)
        self._pump()

    # --- stages and links ------------------------------------------------------------------------------------

    def _at(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), act))

    def _scattered(self, time_s: float) -> float:
        return time_s * max(self._random.gauss(1.0, self._noise), 0.3)

    def _arrive(self, stage: int, step: _Step) -> None:
        step.arrived_at_s = self.now_s
        patience_s = self._computing[stage].put(step, self.now_s)
        if patience_s:
            self._at(patience_s, lambda: self._compute_next(stage))
        self._compute_next(stage)

    def _compute_next(self, stage: int) -> None:
        """Of a stage behind the head."""
        queue = self._computing[stage]
        if not queue.is_busy and (steps := queue.ready.take(self.now_s, queue.pays_together)):
            self._compute(stage, steps)

    def _compute(self, stage: int, steps: list[_Step]) -> None:
        """One pass."""
        queue = self._computing[stage]
        others = sum(other.is_busy for other in self._computing)
        queue.is_busy = True
        load = StepLoad.together(step.load for step in steps)
        compute_s = self._scattered(self.stages[stage](load.tokens)) * (1.0 + self._slowed * others)
        for step in steps:
            step.waited_s.append(self.now_s - step.arrived_at_s)
            step.compute_s.append(compute_s)
            step.passes.append(load if step is steps[0] else None)

        def done() -> None:
            queue.is_busy = False
            queue.on_pass(load, compute_s)
            for step in steps:
                self._leave(stage, step)
            if stage == 0:
                self._pump()
            else:
                self._compute_next(stage)

        self._at(compute_s, done)

    def _leave(self, stage: int, step: _Step) -> None:
        if stage == len(self.stages) - 1:
            self._at(self._scattered(self.wire.round_trip_s / 2), lambda: self._back(step))
            return
        step.bytes_left = step.load.tokens * self._token_bytes
        self._sending[stage].waiting[step.traffic].append(step)
        self._send(stage)

    def _send(self, link: int) -> None:
        queue = self._sending[link]
        waiting = None if queue.is_busy else queue.next()
        if waiting is None:
            return
        step = waiting[0]
        piece_bytes = min(step.bytes_left, PIECE_BYTES) if step.traffic is Traffic.BULK else step.bytes_left
        step.bytes_left -= piece_bytes
        if step.bytes_left == 0:
            waiting.popleft()
        queue.is_busy = True

        def sent() -> None:
            queue.is_busy = False
            if step.bytes_left == 0:
                self._at(self._scattered(self.wire.round_trip_s / 2), lambda: self._arrive(link + 1, step))
            self._send(link)

        self._at(piece_bytes / self.wire.rate_bytes_per_s, sent)
