"""Whether a sequence may come in, and when to try again if not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from molink_common.messages import HeadReport, RefusalCode, Refused, SubmitSequence
from molink_scheduler import books as book
from molink_scheduler.books import Books
from molink_scheduler.fitness import pool_card
from molink_scheduler.overload import Line

_RETRY_NO_PIPELINE_S = 5.0
_RETRY_UNKNOWN_S = 5.0
_RETRY_MOST_S = 60.0
_RESERVED_PART = 8
"""Of `max_sequences`, this part is kept for tenants that have less than their share."""


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
    return _why_limited(request, books, now_s) or _why_no_room(request, books, now_s)


def _why_limited(request: SubmitSequence, books: Books, now_s: float) -> Refused | None:
    """Its key's limits say no."""
    tenants = (one.record.request.tenant for one in books.sequences.values())
    limited = books.keys.why_limited(request, tenants, now_s)
    if limited is None:
        return None
    return Refused(
        sequence=request.sequence,
        code=limited.code,
        message=limited.message,
        retry_after_s=limited.retry_after_s,
        holds_s=limited.holds_s,
    )


def _why_no_room(request: SubmitSequence, books: Books, now_s: float) -> Refused | None:
    """There is room for no more, whoever asks."""
    if _is_full(request, books):
        return _refusal(
            request,
            RefusalCode.QUEUE_FULL,
            f"{len(books.sequences)} sequences are being served, which is the most",
            retry_after_s=retry_after_s(books.finished_s, now_s),
        )
    return _why_too_late(request, books, now_s)


def retry_after_s(finished_s: Sequence[float], now_s: float) -> float:
    """When a place should be free, from the times at which the last sequences ended."""
    if len(finished_s) < 2:
        return _RETRY_UNKNOWN_S
    seconds_each = (now_s - finished_s[0]) / len(finished_s)
    return min(_RETRY_MOST_S, max(1.0, round(seconds_each, 1)))


def first_token_came(books: Books, sequence: book.Sequence, now_s: float) -> None:
    """Learn how fast the line of those who wait for a first token moves. To be called while it is still in the line."""
    length = sum(not one.generated for one in books.sequences.values())
    books.overload.look(length, now_s, awaits_places=_awaits_places(books))
    books.overload.first_token(len(sequence.record.request.prompt))


def _is_full(request: SubmitSequence, books: Books) -> bool:
    most, taken = books.settings.max_sequences, len(books.sequences)
    if taken >= most or not request.tenant:
        return taken >= most
    if taken < most - most // _RESERVED_PART:
        return False
    taken_by = Counter(one.record.request.tenant for one in books.sequences.values())
    others = len(taken_by.keys() - {request.tenant})
    return taken_by[request.tenant] >= max(most // (others + 2), 1)  # somebody else may come at any time


def _why_too_late(request: SubmitSequence, books: Books, now_s: float) -> Refused | None:
    line = _line(books)
    books.overload.look(line.length, now_s, awaits_places=line.awaits_places)
    late = books.overload.why_not(line, tenant=request.tenant, prompt_tokens=len(request.prompt))
    if late is None:
        return None
    return Refused(
        sequence=request.sequence,
        code=RefusalCode.OVERLOADED,
        message=(
            f"the first token would come in about {late.predicted_s:.0f} s, and requests are taken while it comes "
            f"within {books.settings.ttft_target_s:g} s"
        ),
        retry_after_s=late.retry_after_s,
        holds_s=late.holds_s,
    )


def _line(books: Books) -> Line:
    sequences, prompt_tokens = Counter[str](), Counter[str]()
    for one in books.sequences.values():
        if not one.generated:
            request = one.record.request
            sequences[request.tenant] += 1
            prompt_tokens[request.tenant] += len(request.prompt)
    return Line(sequences=sequences, prompt_tokens=prompt_tokens, awaits_places=_awaits_places(books))


def _awaits_places(books: Books) -> bool:
    return any(head.waiting > 0 for head in _heads(books))


def _heads(books: Books) -> Iterator[HeadReport]:
    for pipeline in books.ready_pipelines:
        layout = pipeline.layout
        worker = books.workers.get(layout.head) if layout is not None else None
        stage = worker.report_of(layout) if worker is not None and layout is not None else None
        if stage is not None and stage.head is not None:
            yield stage.head


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
