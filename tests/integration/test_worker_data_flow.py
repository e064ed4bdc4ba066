"""Stage workers against a real NATS, with an engine that fits on a screen: the test plays scheduler and gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest

from molink.embedded import EmbeddedServer
from molink_common import subjects
from molink_common.bus import NatsBus
from molink_common.errors import ModelError
from molink_common.identity import new_sequence_id
from molink_common.messages import (
    AskSequences,
    Done,
    Dtype,
    Failed,
    FetchFile,
    FileChunk,
    FinishReason,
    PipelinePolicy,
    ReleaseStage,
    Scheduling,
    SequencesHeld,
    StagePhase,
    StartSequence,
    StopSequence,
)
from molink_common.sampling import SamplingOptions
from molink_common.telemetry import AttributeValue, Telemetry
from molink_common.wire import Entry, StepFrame, encode_frame
from molink_stage_worker.batch_plan import BatchPlan
from molink_stage_worker.planning.planner import Planner
from tests.integration.counting_engine import BLOCK, HIDDEN, CountingEngine, CountingModel, expected_text
from tests.integration.worker_pool import Pool, open_pool


@pytest.fixture
async def pool(bus: NatsBus, nats_server: EmbeddedServer, request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    pipeline = abs(hash(request.node.name)) % 1_000_000
    async with open_pool(
        bus, nats_server.url, pipeline, CountingModel(), lambda spec, _: CountingEngine(spec), BLOCK
    ) as opened:
        yield opened


def engine_of(pool: Pool, worker: str) -> CountingEngine:
    engine = pool.engines[worker]
    assert isinstance(engine, CountingEngine)
    return engine


@pytest.fixture
def prompts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every link were slow: short chunks in steps of their own, several of each class under way."""
    plan = BatchPlan(micro_batches=3, chunk_tokens=5, chunks_under_way=3, separate_prefill=True)
    monkeypatch.setattr(Planner, "plan", lambda *_: plan)


@pytest.mark.parametrize("num_stages", [1, 3])
async def test_speculation_gives_the_same_tokens_in_fewer_steps(
    pool: Pool, num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BatchPlan(micro_batches=2, chunk_tokens=5, chunks_under_way=1, separate_prefill=False, draft_price=0.0)
    monkeypatch.setattr(Planner, "plan", lambda *_: plan)
    async with pool.workers(num_stages) as names:
        await pool.form(names, num_blocks=120)
        prompts = [[number + 1] * (3 + 5 * number) for number in range(4)]
        sequences = [await pool.start(names[0], prompt, 80) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences), 30)
        assert [pool.tokens[one] for one in sequences] == [expected_text(prompt, 80) for prompt in prompts]
        report = await pool.until_idle(names[0], 120)
        assert report.drafted_tokens > report.accepted_tokens > 20
        assert all(not engine_of(pool, name).known for name in names)


@pytest.mark.usefixtures("prompts_apart")
async def test_decode_and_prompts_in_steps_of_their_own_give_the_same_tokens(pool: Pool) -> None:
    async with pool.workers(3) as names:
        await pool.form(names, num_blocks=40)
        prompts = [[number + 1] * (3 + 13 * number) for number in range(6)]
        sequences = [await pool.start(names[0], prompt, 25) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        assert [pool.tokens[one] for one in sequences] == [expected_text(prompt, 25) for prompt in prompts]
        await pool.until_idle(names[0], 40)
        assert all(not engine_of(pool, name).known for name in names)

        def measured() -> bool:
            head, middle = (pool.beats[name].stage for name in names[:2])
            return (
                head is not None
                and head.head is not None
                and len(head.head.costs) == 3
                and head.link is not None
                and head.link.round_trip_s is not None
                and middle is not None
                and middle.link is not None
                and middle.link.sent_bytes > 0
            )

        await pool.until(measured)  # the timings of all stages come back to the head


@pytest.mark.parametrize("scheduling", [Scheduling.PLAIN, Scheduling.PUBLISHED])
async def test_the_baselines_give_the_same_tokens(pool: Pool, scheduling: Scheduling) -> None:
    pool.policy = PipelinePolicy(scheduling=scheduling)
    async with pool.workers(2) as names:
        await pool.form(names)
        prompts = [[number + 1] * (3 + 13 * number) for number in range(4)]
        sequences = [await pool.start(names[0], prompt, 12) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        assert [pool.tokens[one] for one in sequences] == [expected_text(prompt, 12) for prompt in prompts]
        await pool.until_idle(names[0])


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_sequences_run_through_all_stages_and_leave_nothing_behind(pool: Pool, num_stages: int) -> None:
    async with pool.workers(num_stages) as names:
        await pool.form(names)
        prompts = [list(range(1 + number, 1 + number + 3 + 11 * number)) for number in range(5)]
        sequences = [await pool.start(names[0], prompt, 7 + n) for n, prompt in enumerate(prompts)]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        for number, sequence in enumerate(sequences):
            assert pool.tokens[sequence] == expected_text(prompts[number], 7 + number)
            assert pool.finishes[sequence] is FinishReason.LENGTH
        await pool.until_idle(names[0])
        # the last closes travel in a step without entries, and that has come back too
        assert all(not engine_of(pool, name).known for name in names)


async def test_preempted_sequences_give_the_same_tokens(pool: Pool) -> None:
    async with pool.workers(2) as names:
        await pool.form(names, num_blocks=12)
        prompts = [[number + 1] * 9 for number in range(4)]
        sequences = [await pool.start(names[0], prompt, 20) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        assert [pool.tokens[one] for one in sequences] == [expected_text(prompt, 20) for prompt in prompts]
        assert (await pool.until_idle(names[0], 12)).preemptions > 0


async def test_a_stopped_sequence_is_forgotten_on_every_stage(pool: Pool) -> None:
    async with pool.workers(2) as names:
        await pool.form(names, num_blocks=200)
        sequence = await pool.start(names[0], [1, 2, 3], 700)
        await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 3)
        held = await pool.to_head(names[0], AskSequences(pipeline=pool.pipeline))
        assert isinstance(held, SequencesHeld)
        assert held.sequences == (sequence,)
        assert await pool.to_head(names[0], StopSequence(pipeline=pool.pipeline, sequence=sequence)) == Done()
        await pool.until_idle(names[0], 200)
        assert all(not engine_of(pool, name).known for name in names)
        assert sequence not in pool.finishes


async def test_frames_of_another_epoch_and_garbage_are_dropped_and_counted(pool: Pool) -> None:
    async with pool.workers(2) as names:
        await pool.form(names, epoch=5)
        stale = StepFrame(
            pipeline=pool.pipeline,
            epoch=4,
            step=1,
            entries=(Entry(sequence=7, start=0, count=1, opens=True, new_blocks=(0,)),),
            extra=b"",
            hidden_size=HIDDEN,
            dtype=Dtype.FLOAT32,
            hidden=memoryview(bytes(16)),
        )
        await pool.bus.publish(subjects.stage(pool.pipeline, 1), encode_frame(stale))
        await pool.bus.publish(subjects.stage(pool.pipeline, 1), b"garbage")

        def dropped() -> bool:
            stage = pool.beats[names[1]].stage
            return stage is not None and stage.frames_dropped == 2

        await pool.until(dropped)
        assert engine_of(pool, names[1]).known == {}
        sequence = await pool.start(names[0], [5, 6], 4, epoch=5)
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([5, 6], 4)


async def test_a_step_that_is_lost_on_the_way_is_computed_again(pool: Pool) -> None:
    async with pool.workers(2) as names:
        await pool.form(names)
        sequence = await pool.start(names[0], [1, 2, 3], 40)
        await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 3)
        engine_of(pool, names[1]).known.clear()  # the next step contradicts what the tail knows
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([1, 2, 3], 40)
        await pool.until_idle(names[0])


async def test_an_assignment_replaces_the_stage_unless_its_epoch_is_older(pool: Pool) -> None:
    async with pool.workers(1) as (name,):
        await pool.form([name], epoch=3)
        assert isinstance(await pool.order(name, pool.assignment(0, 1, epoch=2)), Failed)
        await pool.form([name], epoch=4)
        sequence = await pool.start(name, [9], 3, epoch=4)
        await pool.until(lambda: sequence in pool.finishes)
        assert await pool.order(name, ReleaseStage(pipeline=pool.pipeline)) == Done()
        await pool.until(lambda: pool.beats[name].stage is None)


async def test_a_stage_that_cannot_be_loaded_says_why(pool: Pool) -> None:
    async with pool.workers(1) as (name,):
        pool.load_problem = ModelError("the file model.safetensors is missing")
        assert await pool.order(name, pool.assignment(0, 1)) == Done()

        def failed() -> bool:
            stage = pool.beats[name].stage
            return stage is not None and stage.phase is StagePhase.FAILED

        await pool.until(failed)
        stage = pool.beats[name].stage
        assert stage is not None
        assert stage.problem == "the file model.safetensors is missing"
        pool.load_problem = None
        await pool.form([name], epoch=2)


async def test_an_engine_that_breaks_at_work_fails_its_stage(pool: Pool) -> None:
    async with pool.workers(2) as names:
        await pool.form(names)
        engine_of(pool, names[1]).fail_with = MemoryError()
        await pool.start(names[0], [1], 5)

        def failed() -> bool:
            stage = pool.beats[names[1]].stage
            return stage is not None and stage.phase is StagePhase.FAILED

        await pool.until(failed)
        stage = pool.beats[names[1]].stage
        assert stage is not None
        assert stage.problem is not None
        assert "memory" in stage.problem


async def test_what_cannot_be_started_is_refused(pool: Pool) -> None:
    async with pool.workers(1) as (name,):
        start = StartSequence(
            pipeline=pool.pipeline,
            epoch=1,
            sequence=new_sequence_id(),
            prompt=(1,) * 400,
            options=SamplingOptions(max_tokens=5),
        )
        assert isinstance(await pool.to_head(name, start), Failed)  # no stage yet
        await pool.form([name])
        assert isinstance(await pool.to_head(name, start.model_copy(update={"epoch": 2})), Failed)
        answer = await pool.to_head(name, start)
        assert isinstance(answer, Failed)
        assert "do not fit" in answer.message


async def test_files_are_handed_out_in_pieces(pool: Pool) -> None:
    async with pool.workers(1) as (name,):
        wanted = FetchFile(name="tokenizer.json", offset_bytes=2, size_bytes=3)
        chunk = await pool.bus.ask(subjects.files(name), wanted, FileChunk, Failed, timeout_s=5)
        assert isinstance(chunk, FileChunk)
        assert chunk.data == b"234"
        other = wanted.model_copy(update={"name": "../secrets"})
        assert isinstance(await pool.bus.ask(subjects.files(name), other, FileChunk, Failed, timeout_s=5), Failed)


async def test_a_leaving_worker_says_so_and_ends(pool: Pool) -> None:
    async with pool.workers(1) as (name,):
        await pool.form([name])
    await pool.until(lambda: pool.beats[name].leaving)


class Recorder(Telemetry):
    """Keeps what would be exported."""

    def __init__(self) -> None:
        super().__init__(None)
        self.spans: list[tuple[str, int, int]] = []

    def record(
        self, name: str, *, parent: str, start_ns: int, end_ns: int, attributes: Mapping[str, AttributeValue]
    ) -> None:
        assert name == "stage step"
        assert 0 < start_ns <= end_ns
        self.spans.append((parent, int(attributes["molink.stage"]), int(attributes["molink.tokens"])))


async def test_each_stage_records_a_span_for_each_step_of_a_traced_sequence(pool: Pool) -> None:
    recorder = pool.telemetry = Recorder()
    async with pool.workers(2) as names:
        await pool.form(names)
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        traced = await pool.start(names[0], [4, 5, 6], 3, trace=trace)
        plain = await pool.start(names[0], [4, 5], 3)
        await pool.until(lambda: traced in pool.finishes and plain in pool.finishes)
        await pool.until_idle(names[0])
    assert len(recorder.spans) == 6
    assert {parent for parent, _, _ in recorder.spans} == {trace}
    assert [stage for _, stage, _ in recorder.spans].count(1) == 3
