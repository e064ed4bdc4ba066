"""A pipeline with a virtual clock, for the micro-batch planner: stages, links and sequences that never end.

    head plans ─▶ stage 0 ─▶ link (rate, delay) ─▶ stage 1 ─▶ … ─▶ tail ─▶ delay ─▶ head

Stages and links serve one after the other, decode before bulk with every fourth turn for bulk; a bulk frame crosses a
link in pieces. All times scatter.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from molink_common.messages import PipelinePolicy
from molink_common.wire import Traffic
from molink_stage_worker.batch_plan import BatchPlan
from molink_stage_worker.planning import Demand, Planner, StepObservation

PIECE_BYTES = 32 * 1024
STEP_TOKENS = 256
Cost = Callable[[int], float]
"""Seconds of a step of so many tokens."""


def affine(fixed_s: float = 0.008, per_token_s: float = 0.0016) -> Cost:
    """A CPU."""
    return lambda tokens: fixed_s + per_token_s * tokens


def roofline(least_s: float = 0.0175, per_token_s: float = 0.000875) -> Cost:
    """A GPU: reading the weights, or computing."""
    return lambda tokens: max(least_s, per_token_s * tokens)


def stairs(fixed_s: float = 0.02, step_s: float = 0.012, width: int = 16) -> Cost:
    """A CPU that computes tiles."""
    return lambda tokens: fixed_s + step_s * math.ceil(tokens / width)


@dataclass(frozen=True, slots=True)
class Wire:
    rate_bytes_per_s: float
    round_trip_s: float


LAN = Wire(125e6, 0.0004)
WAN_30 = Wire(12.5e6, 0.03)
WAN_100 = Wire(12.5e6, 0.1)
SLOW_30 = Wire(1.25e6, 0.03)


@dataclass(slots=True)
class _Prompt:
    at_s: float
    left: int


@dataclass(slots=True, eq=False)
class _Step:
    traffic: Traffic
    planned_at_s: float
    sequences: list[int]
    prompt_tokens: int = 0
    ends_prompt: _Prompt | None = None
    arrived_at_s: float = 0.0
    bytes_left: int = 0
    compute_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.sequences) + self.prompt_tokens


class _Queue:
    """Decode before bulk; every fourth turn, if both wait, is bulk's."""

    def __init__(self) -> None:
        self.waiting: dict[Traffic, deque[_Step]] = {traffic: deque() for traffic in Traffic}
        self.is_busy = False
        self.turn = 0

    def put(self, step: _Step) -> None:
        self.waiting[step.traffic].append(step)

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
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._computing = [_Queue() for _ in stages]
        self._sending = [_Queue() for _ in stages[1:]]
        self._ready = deque(range(sequences))
        self._last_s: dict[int, float] = {}
        self._sequences = sequences
        self._under_way = dict.fromkeys(Traffic, 0)
        self._prompts: deque[_Prompt] = deque()
        self._turn = 0
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
        head = self._computing[0]
        if head.is_busy or head.next() is not None:
            return
        plan = self._plan()
        decodes = bool(self._ready) and self._under_way[Traffic.DECODE] < plan.micro_batches
        cuts = bool(self._prompts) and plan.separate_prefill and self._under_way[Traffic.BULK] < plan.chunks_under_way
        if decodes and cuts:
            self._turn += 1
            decodes = self._turn % 4 != 0
        shares = bool(self._prompts) and not plan.separate_prefill
        if decodes or (shares and self._under_way[Traffic.DECODE] < plan.micro_batches):
            most = min(-(-self._sequences // plan.micro_batches), len(self._ready))
            step = _Step(Traffic.DECODE, self.now_s, [self._ready.popleft() for _ in range(most)])
            if shares:
                self._cut(step, min(plan.chunk_tokens, STEP_TOKENS - most))
        elif cuts:
            step = _Step(Traffic.BULK, self.now_s, [])
            self._cut(step, plan.chunk_tokens)
        else:
            return
        self._under_way[step.traffic] += 1
        self._arrive(0, step)

    def _plan(self) -> BatchPlan:
        waiting = sum(prompt.left for prompt in self._prompts)
        demand = Demand(decoding=self._sequences, context_tokens=60, prompt_tokens_waiting=waiting)
        self.plan = self.planner.plan(demand, self.now_s)
        if not self.counts or self.counts[-1][1] != self.plan.micro_batches:
            self.counts.append((self.now_s, self.plan.micro_batches))
        return self.plan

    def _cut(self, step: _Step, most: int) -> None:
        prompt = self._prompts[0]
        step.prompt_tokens = min(prompt.left, most)
        prompt.left -= step.prompt_tokens
        if prompt.left == 0:
            step.ends_prompt = self._prompts.popleft()

    def _back(self, step: _Step) -> None:
        self._under_way[step.traffic] -= 1
        for sequence in step.sequences:
            if sequence in self._last_s:
                self.gaps_s.append((self.now_s, self.now_s - self._last_s[sequence]))
            self._last_s[sequence] = self.now_s
            self._ready.append(sequence)
        if step.ends_prompt is not None:
            self.first_tokens_s.append(self.now_s - step.ends_prompt.at_s)
        decoding = len(step.sequences)
        observation = StepObservation(
            traffic=step.traffic,
            tokens=step.tokens,
            sequences=decoding + (1 if step.prompt_tokens else 0),
            context_tokens=60 * decoding + step.prompt_tokens,
            decode_tokens=decoding,
            payload_bytes=step.tokens * self._token_bytes,
            compute_s=tuple(step.compute_s),
            waited_s=tuple(step.waited_s),
            ring_s=self.now_s - step.planned_at_s,
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
        self._computing[stage].put(step)
        self._compute(stage)

    def _compute(self, stage: int) -> None:
        queue = self._computing[stage]
        if queue.is_busy:
            return
        waiting = queue.next()
        if waiting is None:
            if stage == 0:
                self._pump()
            return
        step = waiting.popleft()
        queue.is_busy = True
        step.waited_s.append(self.now_s - step.arrived_at_s)
        step.compute_s.append(self._scattered(self.stages[stage](step.tokens)))

        def done() -> None:
            queue.is_busy = False
            if stage == len(self.stages) - 1:
                self._at(self._scattered(self.wire.round_trip_s / 2), lambda: self._back(step))
            else:
                step.bytes_left = step.tokens * self._token_bytes
                self._sending[stage].put(step)
                self._send(stage)
            self._compute(stage)

        self._at(step.compute_s[-1], done)

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
