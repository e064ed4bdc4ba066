"""Over random traffic: tenants that have work waiting are served alike, and nobody starves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.fair_queue import OUTPUT_TOKEN, PROMPT_TOKEN

MOST_PROMPT, MOST_NEW, PLACES, STEP_TOKENS = 24, 12, 4, 16
SIZES = st.tuples(st.integers(1, MOST_PROMPT), st.integers(1, MOST_NEW))


class Pool:
    """A head whose pipeline answers each step at once; counts what each tenant gets."""

    def __init__(self, *, num_blocks: int = 64) -> None:
        limits = BatchLimits(num_blocks=num_blocks, block_size=4, step_tokens=STEP_TOKENS, max_running=PLACES)
        plan = BatchPlan(micro_batches=2, chunk_tokens=STEP_TOKENS, chunks_under_way=1, separate_prefill=False)
        self.head = Batcher(limits, plan)
        self.tenant_of: dict[str, str] = {}
        self.starts: dict[str, StartSequence] = {}
        self.tokens = Counter[str]()
        self.service = Counter[str]()
        self._computed = Counter[str]()

    def add(self, tenant: str, prompt: int, new: int) -> str:
        start = StartSequence(
            pipeline=1,
            epoch=1,
            sequence=sequence_id(len(self.starts) + 1),
            prompt=tuple(range(prompt)),
            options=SamplingOptions(max_tokens=new),
            tenant=tenant,
        )
        self.starts[start.sequence] = start
        self.head.add(start)
        return start.sequence

    def step(self) -> StepPlan | None:
        plan = self.head.next_step()
        if plan is None:
            return None
        events = []
        for entry in plan.entries:
            name = sequence_id(entry.sequence)
            start = self.starts[name]
            for place in range(max(entry.start, self._computed[name]), entry.start + entry.count):
                weight = PROMPT_TOKEN if place < len(start.prompt) else OUTPUT_TOKEN
                self.service[start.tenant] += weight
                self._computed[name] = place + 1
            if entry.logits is Logits.LAST:
                index = self.tokens[name]
                self.tokens[name] += 1
                finish = FinishReason.LENGTH if index + 1 == start.options.max_tokens else None
                events.append(TokenEvent(sequence=name, index=index, token=1, finish=finish))
        self.head.on_tokens(StepTokens(pipeline=1, epoch=1, step=plan.step, events=tuple(events)))
        self.head.check_invariants()
        assert not self.head.take_failed()
        return plan

    def waiting(self, tenant: str) -> int:
        return sum(self.starts[name].tenant == tenant for name in self.head.sequences)


@settings(deadline=None, max_examples=40)
@given(st.lists(SIZES, min_size=30, max_size=60), st.lists(SIZES, min_size=30, max_size=60), st.integers(16, 64))
def test_two_tenants_with_work_waiting_are_served_alike(
    first: list[tuple[int, int]], second: list[tuple[int, int]], num_blocks: int
) -> None:
    pool = Pool(num_blocks=num_blocks)
    for prompt, new in first:
        pool.add("a", prompt, new)
    for prompt, new in second:
        pool.add("b", prompt, new)
    largest = PROMPT_TOKEN * MOST_PROMPT + OUTPUT_TOKEN * MOST_NEW
    while min(pool.waiting("a"), pool.waiting("b")) > PLACES:
        assert pool.step() is not None
        assert abs(pool.service["a"] - pool.service["b"]) <= PLACES * largest


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("abcde"), SIZES), min_size=1, max_size=60),
    st.integers(10, 40),
)
def test_everybody_gets_all_tokens_however_scarce_the_blocks(
    wishes: list[tuple[str, tuple[int, int]]], num_blocks: int
) -> None:
    pool = Pool(num_blocks=num_blocks)
    for tenant, (prompt, new) in wishes:
        pool.add(tenant, prompt, new)
        pool.step()
    for _ in range(20_000):
        if not pool.head.sequences:
            break
        pool.step()
    assert pool.head.sequences == ()
    assert all(pool.tokens[name] == start.options.max_tokens for name, start in pool.starts.items())


@settings(deadline=None, max_examples=25)
@given(st.lists(SIZES, min_size=5, max_size=15), st.integers(20, 60))
def test_a_flood_that_never_ends_holds_nobody_up(polite: list[tuple[int, int]], num_blocks: int) -> None:
    """One tenant keeps a long queue filled; the other sends one request after the other."""
    pool = Pool(num_blocks=num_blocks)
    for prompt, new in polite:
        name = pool.add("polite", prompt, new)
        steps = 0
        while name in pool.head.sequences:
            while pool.waiting("flood") < 20:
                pool.add("flood", MOST_PROMPT, MOST_NEW)
            pool.step()
            steps += 1
            # alone it would take its chunks and a step for each token; with turns, a few times that
            assert steps <= 20 + 6 * (prompt // 4 + new), "the flood holds the polite one up"
