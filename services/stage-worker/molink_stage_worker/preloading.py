"""Weights that are loaded before anybody needs them, so that a stage that is lost elsewhere is taken on at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from molink_common.logs import get_logger
from molink_common.messages import LayerRange, PreloadStages
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.engine_shelf import EngineShelf
from molink_stage_worker.stage_loading import (
    Blocks,
    Checkpoints,
    LoadingAbandoned,
    StageLoader,
    Weights,
    kv_bytes,
    weight_bytes,
)

log = get_logger("preloading")

_BACKGROUND_NICENESS = 10
"""A tenth of a busy core. Not the lowest: the stage that has to wait for such a thread would wait for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    weights: Weights
    abandoned: threading.Event
    ended: asyncio.Event


class Preloader:
    """Puts what is wanted on the shelf, one engine after the other, whenever it may.

    `may_load` says whether no stage is being loaded. `on_change` is called when `preloaded` may have changed.
    """

    def __init__(
        self,
        *,
        shelf: EngineShelf,
        loader: StageLoader,
        threads: int,
        tasks: asyncio.TaskGroup,
        may_load: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        self._shelf = shelf
        self._loader = loader
        self._threads = threads
        self._tasks = tasks
        self._may_load = may_load
        self._on_change = on_change
        self._order: PreloadStages | None = None
        self._checkpoints: Checkpoints | None = None
        self._failed: set[Weights] = set()
        self._under_way: _UnderWay | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def preloaded(self) -> tuple[LayerRange, ...]:
        """What was ordered last and is there."""
        return tuple((one.first_layer, one.last_layer) for one in self._shelf.wanted if one in self._shelf)

    def want(self, order: PreloadStages, checkpoints: Checkpoints) -> None:
        """Replace what is to be there. Returns at once."""
        if order == self._order:  # said twice means once
            return
        self._order, self._checkpoints = order, checkpoints
        self._failed.clear()
        self._shelf.wanted = tuple(
            Weights(fingerprint=order.fingerprint, first_layer=first, last_layer=last, dtype=order.dtype)
            for first, last in order.layers
        )
        if self._under_way is not None and self._under_way.weights not in self._shelf.wanted:
            self._under_way.abandoned.set()
        self._on_change()
        self.go_on()

    def go_on(self) -> None:
        """Something has changed: there may be work that was impossible before."""
        is_working = self._task is not None and not self._task.done()
        if not is_working and self._next() is not None:
            self._task = self._tasks.create_task(self._work())

    def yield_to(self, weights: Weights) -> None:
        """A stage of these weights is to be loaded: let go of any others."""
        if self._under_way is not None and self._under_way.weights != weights:
            self._under_way.abandoned.set()

    async def ended(self, weights: Weights) -> None:
        """Wait while these very weights are being preloaded; then they are on the shelf, or could not be loaded."""
        if self._under_way is not None and self._under_way.weights == weights:
            await self._under_way.ended.wait()

    def stop(self) -> None:
        """Load nothing more. What is being loaded is abandoned as soon as its loader tells of its progress."""
        self._order = None
        self._shelf.wanted = ()
        if self._under_way is not None:
            self._under_way.abandoned.set()

    async def _work(self) -> None:
        while (weights := self._next()) is not None:
            assert self._checkpoints is not None
            assert self._order is not None
            blocks = Blocks(num_blocks=self._order.num_blocks, block_size=self._order.block_size)
            under_way = self._under_way = _UnderWay(weights=weights, abandoned=threading.Event(), ended=asyncio.Event())
            try:
                engine = await self._load(weights, blocks, self._checkpoints, under_way.abandoned)
                kept = self._shelf.put(weights, engine)
                del engine
                if not kept:  # it turned out larger than its card says
                    self._failed.add(weights)
                log.info("stage preloaded", first_layer=weights.first_layer, last_layer=weights.last_layer, kept=kept)
            except LoadingAbandoned:
                log.info("preloading abandoned", first_layer=weights.first_layer, last_layer=weights.last_layer)
            except Exception as error:  # a convenience must not end the worker; loading the stage itself says it aloud
                self._failed.add(weights)
                log.warning("stage not preloaded", first_layer=weights.first_layer, problem=str(error))
            finally:
                self._under_way = None
                under_way.ended.set()
            self._on_change()

    def _next(self) -> Weights | None:
        """The first that is wanted, is not there, and has room beside those before it and the stage at work."""
        if self._order is None or self._checkpoints is None or not self._may_load():
            return None
        blocks = Blocks(num_blocks=self._order.num_blocks, block_size=self._order.block_size)
        card = self._checkpoints.card
        for weights in self._shelf.wanted:
            if weights in self._shelf or weights in self._failed or weights == self._shelf.held:
                continue
            own_bytes = weight_bytes(card, weights)
            if own_bytes + kv_bytes(card, weights, blocks) > self._shelf.room_bytes:
                continue  # it could be held, but not serve
            if self._shelf.make_room(own_bytes, sparing=self._shelf.wanted):
                return weights
        return None

    async def _load(
        self, weights: Weights, blocks: Blocks, checkpoints: Checkpoints, abandoned: threading.Event
    ) -> Engine:
        loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="preload", initializer=self._settle_in_background
        )
        try:
            return await loop.run_in_executor(
                executor,
                lambda: self._loader.load(
                    weights, blocks, checkpoints, abandoned=abandoned, advance=lambda _share: None
                ),
            )
        finally:
            abandoned.set()
            executor.shutdown(wait=False)

    def _settle_in_background(self) -> None:
        torch.set_num_threads(self._threads)
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
