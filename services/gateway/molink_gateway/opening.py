"""From an HTTP request to a prepared answer and the mailbox that its tokens arrive in: a new one, or one taken up."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from starlette.datastructures import Headers

from molink_common.identity import SequenceId
from molink_gateway.access_log import RequestRecord
from molink_gateway.api_errors import bad_request
from molink_gateway.chats import prepare_chat
from molink_gateway.cluster import Cluster, ServedModel
from molink_gateway.completions import prepare_completion
from molink_gateway.mailbox import Mailbox
from molink_gateway.preparation import Origin, Prepared
from molink_gateway.requests import parse_chat, parse_completion
from molink_gateway.resumption import prepare_resumed
from molink_gateway.sequences import Sequences
from molink_gateway.stream_place import Place, parse_place

LAST_EVENT_ID = "last-event-id"
RESUMABLE = "x-molink-resumable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it came."""

    body: bytes
    headers: Headers
    record: RequestRecord
    trace: str | None


Opened = AbstractAsyncContextManager[tuple[Prepared, Mailbox]]
Open = Callable[[Asked], Opened]


class Openings:
    """The ways in which an answer begins. Each raises `ApiError` for a request that cannot be answered."""

    def __init__(self, cluster: Cluster, sequences: Sequences, *, gateway: str, are_all_resumable: bool) -> None:
        self._cluster = cluster
        self._sequences = sequences
        self._gateway = gateway
        self._are_all_resumable = are_all_resumable

    def chat(self, asked: Asked) -> Opened:
        """``POST /v1/chat/completions``."""
        return self._new_or_known(asked, self.prepare_chat)

    def completion(self, asked: Asked) -> Opened:
        """``POST /v1/completions``."""
        return self._new_or_known(asked, self._prepare_completion)

    @contextlib.asynccontextmanager
    async def stream(self, asked: Asked, sequence: SequenceId) -> AsyncIterator[tuple[Prepared, Mailbox]]:
        """``GET /v1/streams/{sequence}``: from the beginning, or from where `Last-Event-ID` says."""
        text = asked.headers.get(LAST_EVENT_ID)
        told = None if text is None else parse_place(text)
        if told is not None and told.sequence != sequence:
            raise bad_request("`Last-Event-ID` is of another stream than the address.", param="Last-Event-ID")
        async with self._known(asked, sequence, told) as opened:
            yield opened

    def _new_or_known(self, asked: Asked, prepare: Callable[[Asked], Awaitable[Prepared]]) -> Opened:
        text = asked.headers.get(LAST_EVENT_ID)
        if text is None:
            return self.new(asked, prepare)
        told = parse_place(text)
        return self._known(asked, told.sequence, told)

    @contextlib.asynccontextmanager
    async def new(
        self, asked: Asked, prepare: Callable[[Asked], Awaitable[Prepared]]
    ) -> AsyncIterator[tuple[Prepared, Mailbox]]:
        """An answer that begins now."""
        self._sequences.check(self._origin(asked).tenant)
        prepared = await prepare(asked)
        async with self._sequences.open(prepared.submission) as mailbox:
            yield prepared, mailbox

    @contextlib.asynccontextmanager
    async def _known(
        self, asked: Asked, sequence: SequenceId, told: Place | None
    ) -> AsyncIterator[tuple[Prepared, Mailbox]]:
        # who cannot go on with a stream must not take it from a gateway that can
        model = self._cluster.require_any_model()
        asked.record.model = model.card.name
        async with self._sequences.take_up(sequence, tenant=asked.record.tenant) as (recovered, mailbox):
            yield prepare_resumed(recovered, told, model), mailbox

    async def prepare_chat(self, asked: Asked) -> Prepared:
        """A chat that is ready to be submitted."""
        request = parse_chat(asked.body)
        return await prepare_chat(request, self._model(request.model, asked), self._origin(asked))

    async def _prepare_completion(self, asked: Asked) -> Prepared:
        request = parse_completion(asked.body)
        return await prepare_completion(request, self._model(request.model, asked), self._origin(asked))

    def _model(self, name: str, asked: Asked) -> ServedModel:
        model = self._cluster.require_model(name)
        asked.record.model = model.card.name
        return model

    def _origin(self, asked: Asked) -> Origin:
        return Origin(
            request_id=asked.record.request_id,
            gateway=self._gateway,
            trace=asked.trace,
            tenant=asked.record.tenant,
            wants_resuming=self._are_all_resumable or asked.headers.get(RESUMABLE, "0").strip() in ("1", "true"),
        )
