"""Stage workers against a real NATS, with an engine that fits on a screen: the test plays scheduler and gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from molink.embedded import EmbeddedServer
from molink_common import messages, subjects
from molink_common.bus import BusSettings, Incoming, NatsBus, open_bus, serve
from molink_common.errors import ModelError, ProtocolError
from molink_common.identity import new_peer_id, new_sequence_id
from molink_common.messages import (
    AskSequences,
    AssignStage,
    Done,
    Dtype,
    Failed,
    FetchFile,
    FileChunk,
    FinishReason,
    HeadReport,
    Heartbeat,
    JoinPool,
    Message,
    ModelCard,
    ReleaseStage,
    SequencesHeld,
    StagePhase,
    StartSequence,
    StepTokens,
    StopSequence,
    Welcome,
)
from molink_common.sampling import SamplingOptions
from molink_common.telemetry import Telemetry
from molink_common.wire import Entry, Logits, StepFrame, encode_frame
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec, StepOutput
from molink_stage_worker.hardware import Hardware
from molink_stage_worker.stage_slot import SlotSettings, Told
from molink_stage_worker.worker import Worker

VOCABULARY = 97
HIDDEN = 4
LAYERS = 6
BLOCK = 4


class CountingEngine:
    """A token's hidden state is (token, number of layers passed, position, 0).

    The tail's favourite after a token at a position is (sum of the sequence's tokens up to there) mod V: a step
    that is lost, doubled or out of order anywhere changes every token after it.
    """

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self.known: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.fail_with: Exception | None = None

    @property
    def hidden_size(self) -> int:
        return HIDDEN

    @property
    def weight_bytes(self) -> int:
        return 1

    def run(
        self,
        entries: Sequence[Entry],
        closes: Sequence[int],
        *,
        token_ids: Sequence[int] | None = None,
        hidden: memoryview | None = None,
    ) -> StepOutput:
        if self.fail_with is not None:
            raise self.fail_with
        for sequence in closes:
            self.known.pop(sequence, None)
            self.tables.pop(sequence, None)
        total = sum(entry.count for entry in entries)
        hidden_TH = torch.zeros(total, HIDDEN)
        if token_ids is not None:
            assert self.spec.is_head
            hidden_TH[:, 0] = torch.tensor(token_ids)
        elif total:
            assert hidden is not None
            hidden_TH = torch.frombuffer(bytearray(hidden), dtype=torch.float32).reshape(total, HIDDEN)
        hidden_TH[:, 1] += self.spec.last_layer - self.spec.first_layer
        logits: list[torch.Tensor] = []
        at = 0
        for entry in entries:
            if entry.opens:
                self.known[entry.sequence], self.tables[entry.sequence] = [], []
            if entry.sequence not in self.known or entry.start != len(self.known[entry.sequence]):
                raise ProtocolError("not where the sequence goes on")
            tokens, table = self.known[entry.sequence], self.tables[entry.sequence]
            table.extend(entry.new_blocks)
            tokens.extend(int(token) for token in hidden_TH[at : at + entry.count, 0])
            at += entry.count
            assert len(table) * BLOCK >= len(tokens), "tokens without a block"
            if entry.logits is not Logits.NONE:
                row = torch.zeros(VOCABULARY)
                row[expected_token(tokens)] = 5.0
                logits.append(row)
        owners = [block for table in self.tables.values() for block in table]
        assert len(owners) == len(set(owners)), "two sequences in one block"
        if self.spec.is_tail:
            assert total == 0 or bool((hidden_TH[:, 1] == LAYERS).all()), "a layer was left out or run twice"
            return StepOutput(logits_RV=torch.stack(logits) if logits else torch.empty(0, VOCABULARY))
        return StepOutput(hidden=memoryview(hidden_TH.numpy().tobytes()) if total else memoryview(b""))


def expected_token(tokens: Sequence[int]) -> int:
    return sum(tokens) % VOCABULARY


def expected_text(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_token(tokens))
    return tokens[len(prompt) :]


CARD = ModelCard(
    name="counting",
    fingerprint="f" * 16,
    family="counting",
    packed=True,
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    vocabulary_size=VOCABULARY,
    context_length=512,
    checkpoint_dtype="float32",
    layer_parameters=(1,) * LAYERS,
    embedding_parameters=1,
    output_parameters=1,
    kv_scalars_per_token=(1,) * LAYERS,
)


@dataclass
class CountingModel:
    card: ModelCard = CARD

    def checkpoint_for(self, _first: int, _last: int, progress: Told) -> Path:
        progress("nothing to fetch", 1.0)
        return Path("/nowhere")

    def read_file(self, name: str, offset: int, size: int) -> bytes:
        if name != "tokenizer.json":
            raise ModelError(f"{name} is not handed out")
        return b"0123456789"[offset : offset + size]


@dataclass
class Pool:
    """The scheduler's and a gateway's side of the conversation."""

    bus: NatsBus
    url: str
    pipeline: int
    engines: dict[str, CountingEngine] = field(default_factory=dict)
    beats: dict[str, Heartbeat] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finishes: dict[str, FinishReason] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)
    load_problem: Exception | None = None

    async def on_beat(self, message: Message) -> None:
        assert isinstance(message, Heartbeat)
        async with self.heard:
            self.beats[message.worker] = message
            self.heard.notify_all()

    async def on_tokens(self, incoming: Incoming) -> None:
        step = messages.decode(incoming.data, StepTokens)
        async with self.heard:
            for event in step.events:
                got = self.tokens.setdefault(event.sequence, [])
                if event.index == len(got):
                    got.append(event.token)
                    if event.finish is not None:
                        self.finishes[event.sequence] = event.finish
            self.failed.update(step.failed)
            self.heard.notify_all()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s), self.heard:
            await self.heard.wait_for(condition)

    def load_engine(self, worker: str) -> Callable[[StageSpec, Progress], Engine]:
        def load(spec: StageSpec, progress: Progress) -> Engine:
            if self.load_problem is not None:
                raise self.load_problem
            progress(0.5)
            self.engines[worker] = CountingEngine(spec)
            return self.engines[worker]

        return load

    @contextlib.asynccontextmanager
    async def worker(self, *, step_tokens: int = 16, drain_timeout_s: float = 0.0) -> AsyncIterator[Worker]:
        name = new_peer_id("w")
        async with open_bus(BusSettings(url=self.url), name=name) as bus:
            worker = Worker(
                bus=bus,
                settings=SlotSettings(worker=name, device="cpu", threads=1, step_tokens=step_tokens, max_running=64),
                site="here",
                hardware=Hardware(
                    device="cpu", device_name="test", native_dtypes=(Dtype.FLOAT32,), memory_bytes=1 << 30
                ),
                model=None,
                drain_timeout_s=drain_timeout_s,
                prepare=lambda _reference, _told: CountingModel(),
                load_engine=self.load_engine(name),
                telemetry=Telemetry(None),
            )
            stop = asyncio.Event()
            running = asyncio.create_task(worker.run(stop))
            try:
                await self.until(lambda: name in self.beats and self.beats[name].card is not None)
                yield worker
            finally:
                stop.set()
                await asyncio.wait_for(running, timeout=10)

    async def order(self, worker: str, message: Message) -> Message:
        return await self.bus.ask(subjects.control(worker), message, Done, Failed, timeout_s=5)

    async def to_head(self, worker: str, message: Message) -> Message:
        return await self.bus.ask(subjects.head(worker), message, Done, Failed, SequencesHeld, timeout_s=5)

    def assignment(self, index: int, num_stages: int, *, epoch: int = 1, num_blocks: int = 64) -> AssignStage:
        cuts = [LAYERS * stage // num_stages for stage in range(num_stages + 1)]
        return AssignStage(
            pipeline=self.pipeline,
            epoch=epoch,
            fingerprint=CARD.fingerprint,
            index=index,
            num_stages=num_stages,
            first_layer=cuts[index],
            last_layer=cuts[index + 1],
            dtype=Dtype.FLOAT32,
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_steps_under_way=num_stages,
        )

    async def form(self, workers: Sequence[str], *, epoch: int = 1, num_blocks: int = 64) -> None:
        for index, worker in enumerate(workers):
            order = self.assignment(index, len(workers), epoch=epoch, num_blocks=num_blocks)
            assert await self.order(worker, order) == Done()
        await self.until(
            lambda: all(
                (stage := self.beats[worker].stage) is not None
                and stage.phase is StagePhase.READY
                and stage.epoch == epoch
                for worker in workers
            )
        )

    async def start(self, head: str, prompt: Sequence[int], count: int, *, epoch: int = 1) -> str:
        sequence = new_sequence_id()
        start = StartSequence(
            pipeline=self.pipeline,
            epoch=epoch,
            sequence=sequence,
            prompt=tuple(prompt),
            options=SamplingOptions(max_tokens=count, temperature=0.0),
        )
        assert await self.to_head(head, start) == Done()
        return sequence

    async def until_idle(self, head: str, num_blocks: int = 64) -> HeadReport:
        """Wait for a heartbeat sent from now on in which the head holds nothing and no step is under way."""
        del self.beats[head]

        def found() -> HeadReport | None:
            stage = self.beats[head].stage if head in self.beats else None
            return None if stage is None else stage.head

        def is_idle() -> bool:
            report = found()
            return (
                report is not None
                and (report.running, report.waiting, report.steps_under_way) == (0, 0, 0)
                and report.free_blocks == num_blocks
            )

        await self.until(is_idle)
        report = found()
        assert report is not None
        return report


@pytest.fixture
async def pool(bus: NatsBus, nats_server: EmbeddedServer, request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    made = Pool(bus=bus, url=nats_server.url, pipeline=abs(hash(request.node.name)) % 1_000_000)

    async def welcome(_: Message) -> Message:
        return Welcome(model="counting")

    subscriptions = [
        await serve(bus, subjects.JOIN, welcome, JoinPool),
        await serve(bus, subjects.ALL_HEARTBEATS, made.on_beat, Heartbeat),
        await bus.subscribe(subjects.tokens(made.pipeline), made.on_tokens),
    ]
    yield made
    for subscription in subscriptions:
        await subscription.close()


@contextlib.asynccontextmanager
async def workers(pool: Pool, count: int) -> AsyncIterator[list[str]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [(await stack.enter_async_context(pool.worker()))._worker for _ in range(count)]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_sequences_run_through_all_stages_and_leave_nothing_behind(pool: Pool, num_stages: int) -> None:
    async with workers(pool, num_stages) as names:
        await pool.form(names)
        prompts = [list(range(1 + number, 1 + number + 3 + 11 * number)) for number in range(5)]
        sequences = [await pool.start(names[0], prompt, 7 + n) for n, prompt in enumerate(prompts)]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        for number, sequence in enumerate(sequences):
            assert pool.tokens[sequence] == expected_text(prompts[number], 7 + number)
            assert pool.finishes[sequence] is FinishReason.LENGTH
        await pool.until_idle(names[0])
        # the last closes travel in a step without entries, and that has come back too
        assert all(not pool.engines[name].known for name in names)


async def test_preempted_sequences_give_the_same_tokens(pool: Pool) -> None:
    async with workers(pool, 2) as names:
        await pool.form(names, num_blocks=12)
        prompts = [[number + 1] * 9 for number in range(4)]
        sequences = [await pool.start(names[0], prompt, 20) for prompt in prompts]
        await pool.until(lambda: all(sequence in pool.finishes for sequence in sequences))
        assert [pool.tokens[one] for one in sequences] == [expected_text(prompt, 20) for prompt in prompts]
        assert (await pool.until_idle(names[0], 12)).preemptions > 0


async def test_a_stopped_sequence_is_forgotten_on_every_stage(pool: Pool) -> None:
    async with workers(pool, 2) as names:
        await pool.form(names, num_blocks=200)
        sequence = await pool.start(names[0], [1, 2, 3], 700)
        await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 3)
        held = await pool.to_head(names[0], AskSequences(pipeline=pool.pipeline))
        assert isinstance(held, SequencesHeld)
        assert held.sequences == (sequence,)
        assert await pool.to_head(names[0], StopSequence(pipeline=pool.pipeline, sequence=sequence)) == Done()
        await pool.until_idle(names[0], 200)
        assert all(not pool.engines[name].known for name in names)
        assert sequence not in pool.finishes


async def test_frames_of_another_epoch_and_garbage_are_dropped_and_counted(pool: Pool) -> None:
    async with workers(pool, 2) as names:
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
        assert pool.engines[names[1]].known == {}
        sequence = await pool.start(names[0], [5, 6], 4, epoch=5)
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([5, 6], 4)


async def test_a_step_that_is_lost_on_the_way_is_computed_again(pool: Pool) -> None:
    async with workers(pool, 2) as names:
        await pool.form(names)
        sequence = await pool.start(names[0], [1, 2, 3], 40)
        await pool.until(lambda: len(pool.tokens.get(sequence, ())) > 3)
        pool.engines[names[1]].known.clear()  # the next step contradicts what the tail knows
        await pool.until(lambda: sequence in pool.finishes)
        assert pool.tokens[sequence] == expected_text([1, 2, 3], 40)
        await pool.until_idle(names[0])


async def test_an_assignment_replaces_the_stage_unless_its_epoch_is_older(pool: Pool) -> None:
    async with workers(pool, 1) as (name,):
        await pool.form([name], epoch=3)
        assert isinstance(await pool.order(name, pool.assignment(0, 1, epoch=2)), Failed)
        await pool.form([name], epoch=4)
        sequence = await pool.start(name, [9], 3, epoch=4)
        await pool.until(lambda: sequence in pool.finishes)
        assert await pool.order(name, ReleaseStage(pipeline=pool.pipeline)) == Done()
        await pool.until(lambda: pool.beats[name].stage is None)


async def test_a_stage_that_cannot_be_loaded_says_why(pool: Pool) -> None:
    async with workers(pool, 1) as (name,):
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
    async with workers(pool, 2) as names:
        await pool.form(names)
        pool.engines[names[1]].fail_with = MemoryError()
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
    async with workers(pool, 1) as (name,):
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
    async with workers(pool, 1) as (name,):
        wanted = FetchFile(name="tokenizer.json", offset_bytes=2, size_bytes=3)
        chunk = await pool.bus.ask(subjects.files(name), wanted, FileChunk, Failed, timeout_s=5)
        assert isinstance(chunk, FileChunk)
        assert chunk.data == b"234"
        other = wanted.model_copy(update={"name": "../secrets"})
        assert isinstance(await pool.bus.ask(subjects.files(name), other, FileChunk, Failed, timeout_s=5), Failed)


async def test_a_leaving_worker_says_so_and_ends(pool: Pool) -> None:
    async with workers(pool, 1) as (name,):
        await pool.form([name])
    await pool.until(lambda: pool.beats[name].leaving)
