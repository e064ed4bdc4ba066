"""A pool that is all fake but its messages: what the gateway's tests talk to, over a real NATS.

The tests of this file prove the fake itself.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from molink.embedded import EmbeddedServer, free_port
from molink_common import subjects
from molink_common.bus import NatsBus, serve
from molink_common.messages import (
    Admitted,
    AskState,
    CancelSequence,
    ClusterState,
    Dtype,
    Failed,
    FetchFile,
    FileChunk,
    FileOffer,
    FinishReason,
    GatewayAlive,
    Message,
    ModelCard,
    PipelineState,
    Refused,
    Resumed,
    ResumeSequence,
    SequenceFailed,
    StepTokens,
    SubmitSequence,
    TokenEvent,
    TokenLogprob,
)
from molink_gateway.listening import listen
from molink_gateway.server import serve as serve_gateway
from molink_gateway.settings import GatewaySettings
from molink_scheduler.response_shelf import MemoryShelf, keeping_responses

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
WORDS = "The capital of France is Paris. Hello wörld, this is a small text with 日本語 and 😀 in it."
CONTEXT_LENGTH = 256


def make_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """A byte-level tokenizer of 300 tokens, trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return tokenizer


def make_card(folder: Path, vocabulary_size: int, *, fingerprint: str = "f" * 16) -> ModelCard:
    offers = tuple(
        FileOffer(
            name=path.name,
            size_bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.iterdir())
    )
    return ModelCard(
        name="Small-Test",
        aliases=("demo",),
        fingerprint=fingerprint,
        family="llama",
        packed=True,
        num_layers=2,
        hidden_size=8,
        vocabulary_size=vocabulary_size,
        context_length=CONTEXT_LENGTH,
        checkpoint_dtype="float32",
        layer_parameters=(1, 1),
        embedding_parameters=1,
        output_parameters=1,
        kv_scalars_per_token=(1, 1),
        eos_token_ids=(2,),
        tokenizer_files=offers,
    )


class FakePool:
    """Scheduler, worker and tail in one. Answers each sequence with `text` unless `answer` is replaced."""

    def __init__(self, bus: NatsBus, folder: Path, tokenizer: Tokenizer, card: ModelCard) -> None:
        self.bus = bus
        self.folder = folder
        self.tokenizer = tokenizer
        self.card = card
        self.text = " Paris."
        self.refusal: Callable[[SubmitSequence], Refused | None] = lambda _: None
        self.answer: Callable[[SubmitSequence], Awaitable[None]] = self.say_text
        self.submitted: asyncio.Queue[SubmitSequence] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.alive: asyncio.Queue[str] = asyncio.Queue()
        self.damage_files = False
        self.asked = asyncio.Event()
        self.may_admit = asyncio.Event()
        self.may_admit.set()
        self.epoch = 0
        self.resumed: asyncio.Queue[ResumeSequence] = asyncio.Queue()
        self.books: dict[str, SubmitSequence] = {}
        self.said: dict[str, dict[int, TokenEvent]] = {}
        self._step = 0
        self._admitted: set[str] = set()
        self._answers: set[asyncio.Task[None]] = set()

    def state(self, *, ready: bool = True, reason: str = "ready", card: ModelCard | None = None) -> ClusterState:
        pipeline = PipelineState(
            pipeline=0,
            epoch=self.epoch,
            ready=True,
            model=self.card.name,
            dtype=Dtype.FLOAT32,
            num_blocks=8,
            block_size=16,
            stages=("lost", "w1"),
            layers=((0, 1), (1, 2)),
        )
        return ClusterState(ready=ready, reason=reason, card=card or self.card, pipelines=(pipeline,))

    async def say_state(self, state: ClusterState) -> None:
        await self.bus.send(subjects.STATE, state)

    async def say(
        self,
        sequence: str,
        index: int,
        token: int,
        finish: FinishReason | None = None,
        *,
        likeliest: Sequence[TokenLogprob] = (),
        logprob: float | None = None,
    ) -> None:
        event = TokenEvent(
            sequence=sequence,
            index=index,
            token=token,
            finish=finish,
            logprob=logprob,
            top_logprobs=tuple(likeliest),
        )
        await self.say_step([event])

    async def say_step(self, events: Sequence[TokenEvent], failed: Sequence[str] = ()) -> None:
        for event in events:
            self.keep(event)
        self._step += 1
        step = StepTokens(pipeline=0, epoch=self.epoch, step=self._step, events=tuple(events), failed=tuple(failed))
        await self.bus.send(subjects.tokens(0), step)

    def keep(self, event: TokenEvent) -> None:
        """The scheduler has this token, whether or not a gateway has it."""
        self.said.setdefault(event.sequence, {}).setdefault(event.index, event)

    async def say_text(self, submit: SubmitSequence) -> None:
        """The text's tokens one by one, then the end of text, or as many as `max_tokens` allows."""
        tokens = [*self.tokenizer.encode(self.text, add_special_tokens=False).ids, 2]
        most = submit.options.max_tokens
        for index, token in enumerate(tokens[:most]):
            finish = None
            if token == 2:
                finish = FinishReason.STOP
            elif index == most - 1:
                finish = FinishReason.LENGTH
            has_logprobs = submit.options.top_logprobs is not None
            likeliest = [
                TokenLogprob(token=token + n, logprob=-0.5 - n) for n in range(submit.options.top_logprobs or 0)
            ]
            await self.say(
                submit.sequence,
                index,
                token,
                finish,
                logprob=-0.5 if has_logprobs else None,
                likeliest=likeliest,
            )

    async def fail(self, submit: SubmitSequence, message: str) -> None:
        failed = SequenceFailed(sequence=submit.sequence, message=message)
        await self.bus.send(subjects.gateway_failures(submit.gateway), failed)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        subscriptions = [
            await serve(self.bus, subjects.SUBMIT, self._submit, SubmitSequence),
            await serve(self.bus, subjects.RESUME, self._resume, ResumeSequence),
            await serve(self.bus, subjects.CANCEL, self._cancel, CancelSequence),
            await serve(self.bus, subjects.STATUS, self._status, AskState),
            await serve(self.bus, subjects.ALL_GATEWAYS_ALIVE, self._alive, GatewayAlive),
            await serve(self.bus, subjects.files("w1"), self._file, FetchFile),
        ]
        try:
            async with keeping_responses(self.bus, MemoryShelf()):
                await self.bus.flush()
                yield
        finally:
            for subscription in subscriptions:
                await subscription.close()
            for answer in self._answers:
                answer.cancel()
            await asyncio.gather(*self._answers, return_exceptions=True)

    async def _submit(self, submit: SubmitSequence) -> Message:
        self.asked.set()
        await self.may_admit.wait()
        refused = self.refusal(submit)
        if refused is not None:
            return refused
        self._admitted.add(submit.sequence)
        self.books[submit.sequence] = submit
        self.submitted.put_nowait(submit)
        task = asyncio.create_task(self._run(submit))
        self._answers.add(task)
        return Admitted(sequence=submit.sequence)

    async def _run(self, submit: SubmitSequence) -> None:
        await self.answer(submit)

    async def _resume(self, asked: ResumeSequence) -> Message:
        self.resumed.put_nowait(asked)
        request = self.books.get(asked.sequence)
        if request is None:
            return Failed(message="no such sequence")
        said = self.said.get(asked.sequence, {})
        events = [said[index] for index in range(len(said)) if index in said]
        finish = events[-1].finish if events else None
        return Resumed(request=request, generated=tuple(event.token for event in events), finish=finish)

    async def _cancel(self, cancel: CancelSequence) -> None:
        if cancel.sequence in self._admitted:  # as the scheduler does: what is not in its books is ignored
            self.cancelled.put_nowait(cancel.sequence)

    async def _alive(self, alive: GatewayAlive) -> None:
        self.alive.put_nowait(alive.gateway)

    async def _status(self, _: AskState) -> Message:
        return self.state()

    async def _file(self, fetch: FetchFile) -> Message:
        path = self.folder / fetch.name
        if not path.is_file():
            return Failed(message="no such file")
        data = path.read_bytes()[fetch.offset_bytes : fetch.offset_bytes + fetch.size_bytes]
        if self.damage_files:
            data = b"x" + data[1:]
        # Base64Bytes decodes what it is given, so the message is made from what goes on the wire
        return FileChunk.model_validate({"data": base64.b64encode(data)})


@contextlib.asynccontextmanager
async def fake_pool(
    bus: NatsBus, folder: Path, *, chat_template: str | None = CHAT_TEMPLATE
) -> AsyncIterator[FakePool]:
    tokenizer = make_tokenizer(folder, chat_template=chat_template)
    pool = FakePool(bus, folder, tokenizer, make_card(folder, tokenizer.get_vocab_size()))
    async with pool.running():
        yield pool


@contextlib.asynccontextmanager
async def silent_pool(bus: NatsBus, folder: Path) -> AsyncIterator[FakePool]:
    """A pool that admits every sequence and says nothing by itself."""

    async def be_silent(_: SubmitSequence) -> None:
        return

    async with fake_pool(bus, folder) as pool:
        pool.answer = be_silent
        yield pool


async def submitted(pool: FakePool) -> SubmitSequence:
    """The next sequence that a gateway asks for."""
    return await asyncio.wait_for(pool.submitted.get(), 5)


def token_of(pool: FakePool, text: str) -> int:
    """The one token that a text is."""
    (token,) = pool.tokenizer.encode(text).ids
    return int(token)


async def prompt_of(pool: FakePool) -> str:
    """The prompt of the next sequence, as text."""
    return pool.tokenizer.decode(list((await submitted(pool)).prompt), skip_special_tokens=False)


@contextlib.asynccontextmanager
async def running_gateway(server: EmbeddedServer, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway on a free port, in this loop; gives a client for it."""
    port = free_port()
    stop = asyncio.Event()
    chosen = GatewaySettings(nats_url=server.url, port=port, stop_grace_s=0.2, **settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_gateway(chosen, stop, listen(chosen.host, chosen.port)))
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                yield client
        finally:
            stop.set()


async def until_healthy(client: httpx.AsyncClient) -> None:
    """Wait until the gateway says that it can answer."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def ready_gateway(server: EmbeddedServer, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with running_gateway(server, **settings) as client:
        await until_healthy(client)
        yield client


async def test_the_gateway_becomes_healthy_and_lives(bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path) -> None:
    async with fake_pool(bus, tmp_path) as pool, ready_gateway(nats_server, gateway_id="g1") as client:
        assert await asyncio.wait_for(pool.alive.get(), 5) == "g1"
        assert (await client.get("/ready")).json() == {"status": "ok", "reason": "ready"}
        assert (await client.get("/health")).json() == {"status": "ok", "ready": True, "reason": "ready"}
        assert (await client.head("/ready")).status_code == 200
