"""What the gateway knows of the pool: the scheduler's last word, and the model that follows from it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molink_common import messages, subjects
from molink_common.bus import Bus, Incoming
from molink_common.errors import BusError, ModelError, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AskState, ClusterState, FileOffer, ModelCard
from molink_gateway.api_errors import unavailable, unknown_model
from molink_gateway.model_files import fetch_files
from molink_gateway.tokenizer import Tokenizer, load_tokenizer

log = get_logger("gateway.cluster")

SILENCE_S = 3.0
"""The scheduler speaks every second; after this long it counts as gone."""

ModelKey = tuple[str, str, tuple[str, ...], tuple[FileOffer, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that can be asked: its card and its tokenizer."""

    card: ModelCard
    tokenizer: Tokenizer
    known_since_s: int
    """Seconds since 1970."""

    @property
    def names(self) -> tuple[str, ...]:
        """The real name and the others."""
        return (self.card.name, *self.card.aliases)


def key_of(card: ModelCard) -> ModelKey:
    """While this stays the same, so does the loaded tokenizer."""
    return card.fingerprint, card.name, card.aliases, card.tokenizer_files


def workers_to_ask(state: ClusterState) -> tuple[str, ...]:
    """Who may hold the tokenizer's files, most likely first: who serves a stage has prepared the model."""
    serving = [worker for pipeline in state.pipelines for worker in pipeline.stages]
    return tuple(dict.fromkeys([*serving, *(worker.worker for worker in state.workers)]))


class Cluster:
    """The last `ClusterState` and the model loaded for it. `follow` keeps both up to date."""

    def __init__(self, bus: Bus, on_state: Callable[[ClusterState], None]) -> None:
        self._bus = bus
        self._on_state = on_state
        self._heard_s: float | None = None
        self._changed = asyncio.Event()
        self._model: ServedModel | None = None
        self._model_problem: str | None = None
        self.state: ClusterState | None = None

    @property
    def model(self) -> ServedModel | None:
        """The model that can be asked now, if its tokenizer is here."""
        return self._model

    async def follow(self) -> None:
        """Listen to the scheduler and load what it names. Runs until cancelled."""
        subscription = await self._bus.subscribe(subjects.STATE, self._hear)
        try:
            with contextlib.suppress(BusError, ProtocolError):  # no scheduler yet: it will speak when it starts
                self._take(await self._bus.ask(subjects.STATUS, AskState(), ClusterState, timeout_s=2))
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._follow_model()
        finally:
            await subscription.close()

    async def _hear(self, incoming: Incoming) -> None:
        try:
            self._take(messages.decode(incoming.data, ClusterState))
        except ProtocolError as error:
            log.warning("cluster state dropped", problem=str(error))

    def _take(self, state: ClusterState) -> None:
        self.state = state
        self._heard_s = time.monotonic()
        self._changed.set()
        self._on_state(state)

    def _wants_other_model(self) -> bool:
        if self.state is None or self.state.card is None:
            return False
        return self._model is None or key_of(self._model.card) != key_of(self.state.card)

    async def _follow_model(self) -> None:
        """Load the model that the state names, if it is another. A failure is tried again at the next state."""
        state = self.state
        if state is None or state.card is None or not self._wants_other_model():
            return
        try:
            tokenizer = await self._load(state, state.card)
        except (ModelError, OSError) as error:
            if str(error) != self._model_problem:
                log.warning("tokenizer not loaded", model=state.card.name, problem=str(error))
            self._model_problem = str(error)
            return
        self._model = ServedModel(card=state.card, tokenizer=tokenizer, known_since_s=int(time.time()))
        self._model_problem = None
        log.info("model known", model=state.card.name, has_chat_template=tokenizer.has_chat_template)

    async def _load(self, state: ClusterState, card: ModelCard) -> Tokenizer:
        with tempfile.TemporaryDirectory(prefix="molink-gateway-") as folder:
            await fetch_files(self._bus, workers_to_ask(state), card.tokenizer_files, Path(folder))
            return await asyncio.to_thread(load_tokenizer, Path(folder))

    def problem(self) -> str | None:
        """Why a request sent now would not be answered, or None."""
        if not self._bus.is_connected:
            return "the gateway has no connection to NATS"
        if self.state is None or self._heard_s is None:
            return "no scheduler has been heard yet"
        silent_s = time.monotonic() - self._heard_s
        if silent_s > SILENCE_S:
            return f"the scheduler has been silent for {silent_s:.0f} s"
        if not self.state.ready:
            return self.state.reason
        return self._problem_of_model()

    def _problem_of_model(self) -> str | None:
        if self._model is not None and not self._wants_other_model():
            return None
        if self._model_problem is not None:
            return self._model_problem
        if self.state is None or self.state.card is None:
            return self.state.reason if self.state is not None else "no scheduler has been heard yet"
        return "the tokenizer is being fetched"

    def require_model(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            ApiError: 404 for another name than the served model's, 503 while no model is known.
        """
        model = self.require_any_model()
        if name not in model.names:
            raise unknown_model(name, model.names)
        return model

    def require_any_model(self) -> ServedModel:
        """The served model.

        Raises:
            ApiError: 503 while none is known.
        """
        problem = self._problem_of_model()
        if problem is not None or self._model is None:
            raise unavailable(f"No model can be asked yet: {problem}.")
        return self._model
