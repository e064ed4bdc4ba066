"""The judgement over all streams and faults as one object. Decisions only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.fault_lab.faulting import FaultSeen
from bench.fault_lab.judging import Difference, Stream, difference, percentile

_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A stream and how its answer differs from the undisturbed one."""

    stream: Stream
    difference: Difference
    is_greedy: bool

    @property
    def miscounted(self) -> bool:
        """Whether the answer's own count is not what came."""
        told = self.stream.told_tokens
        return self.stream.problem is None and told is not None and told != len(self.stream.tokens)


def judge(streams: Sequence[Stream], expected: Mapping[int, Sequence[int]], greedy: Mapping[int, bool]) -> list[Judged]:
    """Each stream beside the answer that its prompt got while nothing was broken."""
    return [
        Judged(
            stream=stream,
            difference=difference(expected[stream.prompt], stream.tokens),
            is_greedy=greedy[stream.prompt],
        )
        for stream in streams
    ]


def report(judged: Sequence[Judged], faults: Sequence[FaultSeen], control: Sequence[Judged]) -> dict[str, Any]:
    """All that is told at the end; `by_kind` counts a stream with every kind of fault that it met.

    `control` are the same requests asked again before the first fault: what differs there is not the faults' doing.
    """
    met = {id(one) for fault in faults for one in _met(judged, fault)}
    undisturbed = [*control, *(one for one in judged if id(one) not in met)]
    kinds = sorted({fault.kind for fault in faults})
    refusals: Counter[str] = Counter()
    for one in judged:
        refusals.update(one.stream.refusals)
    return {
        "faults": len(faults),
        **_streams(judged),
        **_faults(judged, faults),
        "refused": dict(refusals),
        "resumed": sum(one.stream.resumed for one in judged),
        "undisturbed": {
            **_streams(undisturbed),
            "longest_gap_p50_s": _rounded(percentile(_longest_gaps(undisturbed), 0.5)),
            "longest_gap_max_s": _rounded(percentile(_longest_gaps(undisturbed), 1.0)),
        },
        "by_kind": {kind.value: _of_kind(judged, [fault for fault in faults if fault.kind is kind]) for kind in kinds},
        "problems": _problems([*control, *judged], faults),
    }


def is_clean(result: Mapping[str, Any]) -> bool:
    """Whether no stream noticed more than a pause."""
    counts = ("streams_cut", "tokens_lost", "tokens_repeated", "texts_different", "miscounted", "not_whole")
    return not any(result[name] for name in counts)


def _of_kind(judged: Sequence[Judged], faults: Sequence[FaultSeen]) -> dict[str, Any]:
    met = {id(one): one for fault in faults for one in _met(judged, fault)}
    return {"faults": len(faults), **_streams(list(met.values())), **_faults(judged, faults)}


def _met(judged: Sequence[Judged], fault: FaultSeen) -> list[Judged]:
    return [one for one in judged if _has_met(one.stream, fault)]


def _has_met(stream: Stream, fault: FaultSeen) -> bool:
    """Whether it ran when the fault was done, or began before all was well again."""
    return stream.was_running(fault.done_s) or fault.done_s <= stream.started_s < fault.whole_s


def _streams(judged: Sequence[Judged]) -> dict[str, Any]:
    finished = [one for one in judged if one.stream.problem is None]
    different = [one for one in finished if not one.difference.is_none]
    return {
        "streams": len(judged),
        "streams_cut": len(judged) - len(finished),
        "tokens": sum(len(one.stream.tokens) for one in judged),
        "tokens_lost": sum(one.difference.lost for one in judged),
        "tokens_repeated": sum(one.difference.repeated for one in judged),
        "tokens_other": sum(one.difference.other for one in judged),
        "texts_different": len(different),
        "texts_different_greedy": sum(1 for one in different if one.is_greedy),
        "miscounted": sum(1 for one in judged if one.miscounted),
    }


def _faults(judged: Sequence[Judged], faults: Sequence[FaultSeen]) -> dict[str, Any]:
    streams = [one.stream for one in judged]
    pauses = [pause for fault in faults for pause in pauses_of(streams, fault)]
    noticed = [fault.noticed_after_s for fault in faults if fault.noticed_after_s is not None]
    whole = [fault.whole_s - fault.done_s for fault in faults]
    return {
        "streams_met": sum(stream.was_running(fault.done_s) for fault in faults for stream in streams),
        "pause_p50_s": _rounded(percentile(pauses, 0.5)),
        "pause_p99_s": _rounded(percentile(pauses, 0.99)),
        "pause_max_s": _rounded(percentile(pauses, 1.0)),
        "detection_p50_s": _rounded(percentile(noticed, 0.5)),
        "detection_max_s": _rounded(percentile(noticed, 1.0)),
        "not_noticed": len(faults) - len(noticed),
        "whole_p50_s": _rounded(percentile(whole, 0.5)),
        "sent_mb": round(sum(fault.sent_bytes for fault in faults) / 1e6, 1),
        "not_whole": sum(1 for fault in faults if fault.still_missing is not None),
        "without_warm_standby": sum(1 for fault in faults if not fault.was_warm),
    }


def pauses_of(streams: Sequence[Stream], fault: FaultSeen) -> list[float]:
    """How long each stream that ran stood still over one fault."""
    running = (stream for stream in streams if stream.was_running(fault.done_s))
    return [pause for stream in running if (pause := stream.pause_s(fault.done_s, fault.whole_s)) is not None]


def _longest_gaps(judged: Sequence[Judged]) -> list[float]:
    ran = (one.stream for one in judged if one.stream.accepted_s is not None)
    return [gap for stream in ran if (gap := stream.pause_s(stream.started_s, stream.ended_s)) is not None]


def _problems(judged: Sequence[Judged], faults: Sequence[FaultSeen]) -> list[str]:
    wrong = [one for one in judged if one.stream.problem is not None or not one.difference.is_none or one.miscounted]
    return [_told(one, faults) for one in wrong[:_MOST_PROBLEMS]]


def _told(one: Judged, faults: Sequence[FaultSeen]) -> str:
    stream, difference = one.stream, one.difference
    text = f"client {stream.client}, prompt {stream.prompt}, {len(stream.tokens)} tokens"
    if stream.problem is not None:
        text += f", cut: {stream.problem}"
    if difference.first is not None:
        text += f", not as it should be from token {difference.first} on"
    if one.miscounted:
        text += f", told to be {stream.told_tokens}"
    met = [f"{fault.kind} at token {stream.tokens_at(fault.done_s)}" for fault in faults if _has_met(stream, fault)]
    return f"{text}; met: {', '.join(met) or 'nothing'}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
