"""What simple rules give where nothing takes time but computing, bytes and distance. Pure, with a virtual clock.

    python -m bench.ideal_ring                          synthetic 70B, two stages: LAN, and 100 Mbit/s and 30 ms
    python -m bench.ideal_ring --stages 3 --handovers-ms 0,2,3.5 --vary

The bound of `bounds` is arithmetic: nothing says that there is a way to work by which it is reached. And `bare_ring`
needs a machine, whose processes, sockets and neighbours take their time. This stands between the two. Streams in closed
loops (prompts of 32 tokens, answers of 64, the next prompt at once) go round a ring of stages by two fixed rules, how
many decode steps are under way at most and how many tokens of prompts go with each; the best pair counts.

    head ─▶ link: decode first, chunks of prompts behind it ─▶ stage: chunks wait for a decode step ─▶ … ─▶ head

A *handover* is what one hop costs besides: from a pass that ends to the next stage's pass, or from the tail's pass to
the head's next plan. At 0 only the rules keep it from the bound; at what a system's hops really cost, it says what
better rules could still give that system. Real ones are never alike: with ``--vary`` they are distributed
exponentially about their mean, and steps meet in stages that would else keep out of each other's way.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bench import bounds
from bench.cost_curve import CostCurve
from bench.link_grid.bounding import closed_loop, link_bound
from bench.link_grid.steady_load import LoadShape
from bench.timed_stage import HIDDEN_SIZE, NUM_LAYERS

LOSSLESS = 0.69
"""The share of their bytes that packed activations keep (see docs/weak-links.md)."""
_PIECE_TOKENS = 4
_ALONE_TOKENS = 26
"""Of prompts in a step in which nobody decodes."""
_COMPANY_TOKENS = 26
"""A decode step takes chunks along up to so many tokens in all, and one chunk in any case."""
_RIDING = (4, 6, 8, 10, 12, 16, 24, 32)
_MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)


@dataclass(frozen=True, slots=True)
class Rules:
    """How the head forms steps."""

    micro_batches: int
    """Steps under way at most. Each takes its share of the streams that decode."""
    riding_tokens: int
    """Tokens of prompts that go with a decode step."""


@dataclass(slots=True)
class _Chunk:
    stream: int
    tokens: int
    ends_prompt: bool


@dataclass(slots=True)
class _Step:
    """A step, or the part of one that crosses a link on its own."""

    decoding: list[int]
    chunks: list[_Chunk]
    holds_place: bool
    """Among the steps under way: the decode part does, if there is one."""

    @property
    def tokens(self) -> int:
        return len(self.decoding) + sum(chunk.tokens for chunk in self.chunks)


@dataclass(slots=True)
class _Queues:
    """Of a stage or a link."""

    decode: deque[_Step] = field(default_factory=deque)
    chunks: deque[_Step] = field(default_factory=deque)
    sent_tokens: int = 0
    """Of the first of the chunks."""
    is_busy: bool = False

    def put(self, step: _Step) -> None:
        (self.decode if step.decoding else self.chunks).append(step)


class IdealRing:
    """Streams that go round and round. `pipeline` is what `bounds` knows of a pipeline."""

    def __init__(
        self,
        pipeline: bounds.PipelineBound,
        *,
        streams: int,
        rules: Rules,
        handover_s: float = 0.0,
        varies: bool = False,
    ) -> None:
        self._pipeline = pipeline
        self._shape = LoadShape(streams=streams)
        self._context_tokens = self._shape.prompt_tokens + self._shape.answer_tokens // 2
        self._rules = rules
        self._handover_s = handover_s
        self._varying = random.Random(1) if varies else None
        self._handed_over_s: dict[tuple[int, bool], float] = {}
        self._share = math.ceil(streams / rules.micro_batches)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._stages = [_Queues() for _ in pipeline.stages]
        self._links = [_Queues() for _ in pipeline.links]
        self._ready: deque[int] = deque()
        self._prompts = deque((stream, self._shape.prompt_tokens) for stream in range(streams))
        # the first answers are of different lengths, so that streams do not begin together for ever
        self._left = [1 + stream * self._shape.answer_tokens // streams for stream in range(streams)]
        self._decoding = 0
        self._under_way = 0
        self._tokens = 0

    def tokens_per_s(self, *, seconds: float = 25.0, warm_s: float = 15.0) -> float:
        """Of all streams, over `seconds` of the virtual clock after `warm_s`."""
        self._pump()
        self._run_until(warm_s)
        before = self._tokens
        self._run_until(warm_s + seconds)
        return (self._tokens - before) / seconds

    def _run_until(self, end_s: float) -> None:
        while self._events and self._events[0][0] < end_s:
            self._now_s, _, act = heapq.heappop(self._events)
            act()

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now_s + delay_s, next(self._order), act))

    def _hand_over(self, way_s: float, step: _Step, stage: int, act: Callable[[], None]) -> None:
        """From a stage to the next one; nothing overtakes what is of its class."""
        handover_s = self._handover_s
        if self._varying is not None and handover_s:
            handover_s = self._varying.expovariate(1.0 / handover_s)
        key = (stage, bool(step.decoding))
        at_s = max(self._now_s + way_s + handover_s, self._handed_over_s.get(key, 0.0))
        self._handed_over_s[key] = at_s
        self._after(at_s - self._now_s, act)

    # --- head ------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        head = self._stages[0]
        if head.is_busy or self._under_way >= self._rules.micro_batches or not (self._ready or self._prompts):
            return
        decoding = [self._ready.popleft() for _ in range(min(self._share, len(self._ready)))]
        step = _Step(decoding, self._cut(self._rules.riding_tokens if decoding else _ALONE_TOKENS), holds_place=True)
        self._under_way += 1
        self._compute(0, [step])

    def _cut(self, most_tokens: int) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        while self._prompts and most_tokens:
            stream, left = self._prompts.popleft()
            tokens = min(left, most_tokens)
            most_tokens -= tokens
            chunks.append(_Chunk(stream, tokens, ends_prompt=tokens == left))
            if tokens < left:
                self._prompts.appendleft((stream, left - tokens))
        return chunks

    def _back(self, steps: list[_Step]) -> None:
        for step in steps:
            self._under_way -= step.holds_place
            for stream in step.decoding:
                self._on_token(stream)
            for chunk in step.chunks:
                if chunk.ends_prompt:
                    self._decoding += 1
                    self._on_token(chunk.stream)
        self._pump()

    def _on_token(self, stream: int) -> None:
        self._tokens += 1
        self._left[stream] -= 1
        if self._left[stream]:
            self._ready.append(stream)
            return
        self._left[stream] = self._shape.answer_tokens
        self._decoding -= 1
        self._prompts.append((stream, self._shape.prompt_tokens))

    # --- stages and links ------------------------------------------------------------------------------------

    def _arrive(self, stage: int, step: _Step) -> None:
        self._stages[stage].put(step)
        self._compute_next(stage)

    def _compute_next(self, stage: int) -> None:
        queues = self._stages[stage]
        if queues.is_busy:
            return
        taken = [queues.decode.popleft()] if queues.decode else []
        may_go_alone = not self._decoding or len(queues.chunks) > self._rules.micro_batches
        while queues.chunks and (taken or may_go_alone):
            tokens = sum(step.tokens for step in taken)
            if len(taken) > 1 and tokens + queues.chunks[0].tokens > _COMPANY_TOKENS:
                break
            taken.append(queues.chunks.popleft())
        if taken:
            self._compute(stage, taken)

    def _compute(self, stage: int, steps: list[_Step]) -> None:
        self._stages[stage].is_busy = True
        decoding = sum(len(step.decoding) for step in steps)
        tokens = sum(step.tokens for step in steps)
        self._after(
            self._pipeline.stages[stage](tokens, decoding, decoding * self._context_tokens),
            lambda: self._computed(stage, steps),
        )

    def _computed(self, stage: int, steps: list[_Step]) -> None:
        self._stages[stage].is_busy = False
        if stage == len(self._links):
            self._hand_over(self._pipeline.return_s, steps[0], stage, lambda: self._back(steps))
        else:
            for step in steps:
                if step.decoding and step.chunks:
                    self._links[stage].put(_Step([], step.chunks, holds_place=False))
                    step.chunks = []
                self._links[stage].put(step)
            self._send_next(stage)
        if stage:
            self._compute_next(stage)
        else:
            self._pump()

    def _send_next(self, link: int) -> None:
        queues = self._links[link]
        if queues.is_busy or not (queues.decode or queues.chunks):
            return
        if queues.decode:
            step = queues.decode.popleft()
            tokens, is_sent = step.tokens, True
        else:
            step = queues.chunks[0]
            tokens = min(_PIECE_TOKENS, step.tokens - queues.sent_tokens)
            queues.sent_tokens += tokens
            is_sent = queues.sent_tokens == step.tokens
            if is_sent:
                queues.chunks.popleft()
                queues.sent_tokens = 0
        queues.is_busy = True

        def sent() -> None:
            queues.is_busy = False
            if is_sent:
                self._hand_over(self._pipeline.links[link].one_way_s, step, link, lambda: self._arrive(link + 1, step))
            self._send_next(link)

        self._after(self._pipeline.links[link].transmit_s(tokens * self._pipeline.bytes_a_token), sent)


def best(
    pipeline: bounds.PipelineBound, *, streams: int, handover_s: float, varies: bool = False
) -> tuple[float, Rules]:
    """Tokens a second by the best of many pairs of rules, and that pair."""

    def rate(rules: Rules) -> float:
        ring = IdealRing(pipeline, streams=streams, rules=rules, handover_s=handover_s, varies=varies)
        return ring.tokens_per_s()

    pairs = itertools.starmap(Rules, itertools.product(_MICRO_BATCHES, _RIDING))
    return max(((rate(rules), rules) for rules in pairs if rules.micro_batches <= streams), key=lambda one: one[0])


def timed_pipeline(link: str, *, stages: int) -> bounds.PipelineBound:
    """The synthetic 70B of `bench.links`, its layers cut as evenly as can be, over a link of the grid.

    Its links choose between raw and packed activations by themselves: packed where they are the slower ones.
    """
    way = link_bound(link)
    packs = way.rate_bytes_per_s is not None and way.rate_bytes_per_s < 50e6
    layers = [NUM_LAYERS // stages + (index < NUM_LAYERS % stages) for index in range(stages)]
    return bounds.PipelineBound(
        stages=tuple(CostCurve().stage(count) for count in layers),
        links=(way,) * (stages - 1),
        return_s=way.one_way_s,
        bytes_a_token=HIDDEN_SIZE * 2 * (LOSSLESS if packs else 1.0),
    )


def _main(arguments: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for link, streams in itertools.product(arguments.links, arguments.concurrency):
        pipeline = timed_pipeline(link, stages=arguments.stages)
        bound = bounds.best(pipeline, closed_loop(streams))
        print(f"{link}, {streams} streams: bound {bound.tokens_per_s:.1f} tokens/s ({bound.limit})", flush=True)
        for handover_ms in arguments.handovers_ms:
            rate, rules = best(pipeline, streams=streams, handover_s=handover_ms / 1e3, varies=arguments.vary)
            share = rate / bound.tokens_per_s
            print(
                f"  {handover_ms} ms a hop: {rate:.1f} tokens/s, {share:.0%}, with {rules.micro_batches} micro-batches "
                f"and {rules.riding_tokens} tokens of prompts a step",
                flush=True,
            )
            rows.append(
                {
                    "link": link,
                    "streams": streams,
                    "handover_ms": handover_ms,
                    "tokens_per_s": round(rate, 1),
                    "bound_ratio": round(share, 3),
                    "micro_batches": rules.micro_batches,
                    "riding_tokens": rules.riding_tokens,
                }
            )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=lambda text: text.split(","), default=["lan", "100m30"])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--concurrency", type=lambda text: [int(word) for word in text.split(",")], default=[8, 32, 64])
    parser.add_argument(
        "--handovers-ms", type=lambda text: [float(word) for word in text.split(",")], default=[0.0, 1.0, 3.5]
    )
    parser.add_argument("--vary", action="store_true", help="handovers vary, about the same mean")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    chosen = parser.parse_args()
    result = _main(chosen)
    if chosen.json:
        print(json.dumps({"stages": chosen.stages, "vary": chosen.vary, "rows": result}))
