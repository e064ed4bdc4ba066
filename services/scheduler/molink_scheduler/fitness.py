"""Which workers can hold a stage, and the placement over them."""

from __future__ import annotations

from collections import Counter

from molink_common.messages import Dtype, Heartbeat, ModelCard
from molink_scheduler.books import Books, Worker
from molink_scheduler.placement import Offer, Placement, PlacementSettings, choose_dtype, place


def pool_card(books: Books) -> ModelCard | None:
    """The model that is served: the pipeline's, also while sequences wait for it; else what most have prepared."""
    pipeline = books.pipeline
    if pipeline.layout is not None or (books.sequences and pipeline.card is not None):
        return pipeline.card
    cards = [worker.heartbeat.card for worker in books.workers.values() if worker.heartbeat.card is not None]
    if not cards:
        return pipeline.card
    fingerprint, _ = Counter(card.fingerprint for card in cards).most_common(1)[0]
    return next(card for card in cards if card.fingerprint == fingerprint)


def why_unfit(worker: Worker, card: ModelCard | None, now_s: float) -> str | None:
    """Why the worker cannot be given a stage, or None when it can."""
    heartbeat = worker.heartbeat
    if heartbeat.problem is not None:
        return heartbeat.problem
    if heartbeat.leaving:
        return "it is leaving"
    if heartbeat.card is None or card is None:
        return heartbeat.preparing or "it has not prepared the model yet"
    if heartbeat.card.fingerprint != card.fingerprint:
        return f"it has other weights than the pool ({heartbeat.card.name} {heartbeat.card.fingerprint[:12]})"
    if now_s < worker.barred_until_s:
        return f"{worker.barred_because}; tried again in {worker.barred_until_s - now_s:.0f} s"
    return None


def fit_workers(books: Books, now_s: float) -> list[Worker]:
    """Those that can be given a stage, in the order in which they came."""
    card = pool_card(books)
    return [worker for worker in books.workers.values() if why_unfit(worker, card, now_s) is None]


def place_over(books: Books, workers: list[Worker], *, at_least: int) -> tuple[Placement, Dtype, ModelCard]:
    """The placement over some fit workers (one at least); `at_least` that many stages."""
    settings = books.settings
    card = pool_card(books)
    assert card is not None, "fit workers have a card"
    dtype = choose_dtype(
        None if settings.dtype == "auto" else settings.dtype, [worker.heartbeat.native_dtypes for worker in workers]
    )
    placement = place(
        card,
        [_offer(worker.heartbeat) for worker in workers],
        dtype=dtype,
        settings=PlacementSettings(
            min_stages=at_least,
            max_stages=None if settings.stages == "auto" else settings.stages,
            kv_tokens=settings.kv_tokens,
            min_kv_tokens=settings.min_kv_tokens,
            block_size=settings.block_size,
            overhead_bytes=settings.stage_overhead_bytes,
        ),
    )
    return placement, dtype, card


def _offer(heartbeat: Heartbeat) -> Offer:
    return Offer(
        worker=heartbeat.worker,
        memory_bytes=heartbeat.memory_bytes,
        device=heartbeat.device,
        site=heartbeat.site,
    )
