"""Which workers can hold a stage, and the placement over them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

from molink_common.messages import Dtype, Heartbeat, ModelCard
from molink_scheduler.books import Books, Worker
from molink_scheduler.placement import Link, Offer, Placement, PlacementSettings, choose_dtype, place
from molink_scheduler.settings import SchedulerSettings

_SAME_SPEED_WITHIN = 1.75
"""A device on a busy machine is measured up to this factor slower than it is."""


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


def place_over(
    books: Books, workers: list[Worker], *, at_least: int, standbys: int = 0
) -> tuple[Placement, Dtype, ModelCard]:
    """The placement over some fit workers (one at least); `at_least` that many stages, so many left over if it fits."""
    settings = books.settings
    card = pool_card(books)
    assert card is not None, "fit workers have a card"
    dtype = choose_dtype(
        None if settings.dtype == "auto" else settings.dtype, [worker.heartbeat.native_dtypes for worker in workers]
    )
    placement = place(
        card,
        offers_of(workers),
        dtype=dtype,
        settings=placement_settings(books.settings, at_least=at_least, standbys=standbys),
    )
    return placement, dtype, card


def placement_settings(settings: SchedulerSettings, *, at_least: int = 1, standbys: int = 0) -> PlacementSettings:
    """The bounds of a placement that follow from the scheduler's settings."""
    return PlacementSettings(
        min_stages=at_least,
        max_stages=None if settings.stages == "auto" else settings.stages,
        hold_back=standbys,
        kv_tokens=settings.kv_tokens,
        min_kv_tokens=settings.min_kv_tokens,
        block_size=settings.block_size,
        overhead_bytes=settings.stage_overhead_bytes,
    )


def offers_of(workers: Iterable[Worker]) -> list[Offer]:
    """What the workers bring, as they have measured it.

    A speed is measured once, at a worker's start, beside whatever else its machine was doing. So devices of one name
    whose speeds do not lie far apart count as equally fast; else equal machines would hold unequal stages.
    """
    beats = [worker.heartbeat for worker in workers]
    alike: dict[tuple[str, str], list[float]] = defaultdict(list)
    for beat in beats:
        if beat.parameters_per_s is not None:
            alike[_kind_of_device(beat)].append(beat.parameters_per_s)
    holders = {(stage.pipeline, stage.epoch, stage.index): beat.worker for beat in beats if (stage := beat.stage)}
    return [
        Offer(
            worker=beat.worker,
            memory_bytes=beat.memory_bytes,
            device=beat.device,
            site=beat.site,
            parameters_per_s=_evened(beat.parameters_per_s, alike[_kind_of_device(beat)]),
            measured_in=beat.native_dtypes[0] if beat.native_dtypes else None,
            links=_links(beat, holders),
        )
        for beat in beats
    ]


def _kind_of_device(beat: Heartbeat) -> tuple[str, str]:
    return beat.device.partition(":")[0], beat.device_name


def _evened(speed: float | None, alike: list[float]) -> float | None:
    """The median of those of the same device that may be the same speed, measured at better and worse moments."""
    if speed is None:
        return None
    fastest = max(alike)
    near = [one for one in alike if one * _SAME_SPEED_WITHIN >= fastest]
    return median(near) if speed in near else speed


def _links(beat: Heartbeat, holders: Mapping[tuple[int, int, int], str]) -> tuple[Link, ...]:
    """To the next stage. Without its rate: what little is sent on an idle link says too little of it."""
    stage = beat.stage
    if stage is None or stage.link is None or stage.link.round_trip_s is None:
        return ()
    peer = holders.get((stage.pipeline, stage.epoch, stage.index + 1))
    return () if peer is None else (Link(peer=peer, round_trip_s=stage.link.round_trip_s),)
