"""Whether a sequence may come in, and when to try again if not."""

from __future__ import annotations

from collections.abc import Sequence

from molink_common.messages import RefusalCode, Refused, SubmitSequence
from molink_scheduler.books import Books
from molink_scheduler.fitness import pool_card

_RETRY_NO_PIPELINE_S = 5.0
_RETRY_UNKNOWN_S = 5.0
_RETRY_MOST_S = 60.0


def is_recovering(books: Books, now_s: float) -> bool:
    """Whether a pipeline has served and is expected back soon, so that sequences may wait for it."""
    lost_s = [one.lost_s for one in books.pipelines.values() if one.lost_s is not None]
    return bool(lost_s) and now_s - max(lost_s) < books.settings.pipeline_wait_s


def why_refused(request: SubmitSequence, books: Books, now_s: float) -> Refused | None:
    """A refusal with its reason, or None to admit."""
    card = pool_card(books)
    if card is not None and request.model not in (card.name, *card.aliases):
        names = ", ".join((card.name, *card.aliases))
        return _refusal(
            request, RefusalCode.UNKNOWN_MODEL, f"the model {request.model!r} is not served here; this is: {names}"
        )
    too_long = _why_too_long(request, books)
    if too_long is not None:
        return _refusal(request, RefusalCode.TOO_LONG, too_long)
    if books.store_down_s is not None:
        return _refusal(
            request,
            RefusalCode.NO_PIPELINE,
            "the scheduler cannot reach its Redis, so nothing new is accepted",
            retry_after_s=_RETRY_NO_PIPELINE_S,
        )
    if not books.ready_pipelines and not is_recovering(books, now_s):
        return _refusal(
            request,
            RefusalCode.NO_PIPELINE,
            "no pipeline can serve the model at the moment",
            retry_after_s=_RETRY_NO_PIPELINE_S,
        )
    if len(books.sequences) >= books.settings.max_sequences:
        return _refusal(
            request,
            RefusalCode.QUEUE_FULL,
            f"{len(books.sequences)} sequences are being served, which is the most",
            retry_after_s=retry_after_s(books.finished_s, now_s),
        )
    return None


def retry_after_s(finished_s: Sequence[float], now_s: float) -> float:
    """When a place should be free, from the times at which the last sequences ended."""
    if len(finished_s) < 2:
        return _RETRY_UNKNOWN_S
    seconds_each = (now_s - finished_s[0]) / len(finished_s)
    return min(_RETRY_MOST_S, max(1.0, round(seconds_each, 1)))


def _why_too_long(request: SubmitSequence, books: Books) -> str | None:
    card = pool_card(books)
    wanted = len(request.prompt) + request.options.max_tokens
    asked = f"{len(request.prompt)} prompt tokens and {request.options.max_tokens} new ones"
    if card is not None and wanted > card.context_length:
        return f"{asked} are more than the model's context of {card.context_length} tokens"
    capacities = [one.layout.kv_capacity_tokens for one in books.pipelines.values() if one.layout is not None]
    if capacities and wanted > max(capacities):
        return f"{asked} are more than the {max(capacities)} tokens that the pipeline's KV blocks hold"
    return None


def _refusal(
    request: SubmitSequence, code: RefusalCode, message: str, *, retry_after_s: float | None = None
) -> Refused:
    return Refused(sequence=request.sequence, code=code, message=message, retry_after_s=retry_after_s)
