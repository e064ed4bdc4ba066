"""What is lost, repeated or different; how long streams stood still; when a fault was noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from bench.fault_lab.faulting import FaultSeen
from bench.fault_lab.judging import Difference, Stream, difference, percentile
from bench.fault_lab.noticing import active_scheduler, noticed_after_s, read_events, standing_by
from bench.fault_lab.plan import FaultKind
from bench.fault_lab.report import is_clean, judge, report
from bench.peers.llama_cpp_kill import StreamSeen
from bench.peers.llama_cpp_kill import judge as judge_peer

ANSWER = list(range(100, 200))
OTHER = list(range(500, 570))


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (ANSWER, Difference()),
        (ANSWER[:40] + ANSWER[43:], Difference(lost=3, first=40)),
        (ANSWER[:40] + ANSWER[38:], Difference(repeated=2, first=40)),
        (ANSWER[:90], Difference(lost=10, first=90)),
        ([], Difference(lost=100, first=0)),
        (ANSWER[:30] + OTHER, Difference(other=70, first=30)),
        (ANSWER[:30] + OTHER[:20], Difference(lost=50, other=20, first=30)),
        (ANSWER[:20] + ANSWER[21:60] + ANSWER[58:], Difference(lost=1, repeated=2, first=20)),
        ([*ANSWER[:20], 7, *ANSWER[21:]], Difference(other=1, first=20)),
    ],
)
def test_differences(seen: Sequence[int], expected: Difference) -> None:
    assert difference(ANSWER, seen) == expected
    assert difference(ANSWER, seen).is_none == (list(seen) == ANSWER)


def test_percentiles_are_values_that_were_there() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([1.0, 2.0], 1.0) == 2


def _stream(
    *, number: int = 0, accepted_s: float | None = 0.0, arrivals: Sequence[float] = (), problem: str | None = None
) -> Stream:
    return Stream(
        prompt=0,
        client=number,
        started_s=0.0,
        accepted_s=accepted_s,
        ended_s=arrivals[-1] if arrivals else 1.0,
        arrivals=tuple(arrivals),
        tokens=tuple(ANSWER[: len(arrivals)]),
        told_tokens=len(arrivals),
        problem=problem,
    )


def test_a_pause_is_the_longest_gap_that_overlaps_the_fault() -> None:
    stream = _stream(arrivals=[5, 6, 7, 10, 11, 20])
    assert stream.pause_s(8, 10.5) == 3
    assert stream.pause_s(6.5, 10.5) == 3
    assert stream.pause_s(10.2, 10.6) == 1
    assert stream.pause_s(2, 3) == 5, "the wait for the first token counts as well"
    assert stream.pause_s(21, 25) is None


def test_only_accepted_streams_run() -> None:
    assert not _stream(accepted_s=None).was_running(0.5)
    assert _stream(arrivals=[1, 9]).was_running(5)
    assert not _stream(arrivals=[1, 9]).was_running(10)


def _log(*lines: tuple[str, str, dict[str, str]]) -> str:
    return "\n".join(json.dumps({"at": f"2030-01-01T00:00:{at}Z", "event": event, **more}) for at, event, more in lines)


DONE_AT_S = read_events("any", _log(("10.000", "done", {})))[0].at_s


def test_a_loss_is_noticed_by_the_first_line_after_it_that_names_the_worker() -> None:
    text = _log(
        ("09.900", "worker lost", {"worker": "w1"}),
        ("10.020", "worker lost", {"worker": "w2"}),
        ("10.120", "worker lost", {"worker": "w1"}),
        ("10.500", "worker lost", {"worker": "w1"}),
    )
    events = read_events("scheduler-1", text + '\nTraceback\n{"at": "20')
    assert len(events) == 4
    assert noticed_after_s(FaultKind.KILL_TAIL, "w1", DONE_AT_S, events) == 0.12
    assert noticed_after_s(FaultKind.STOP_HEAD, "w3", DONE_AT_S, events) is None


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        (FaultKind.RESTART_NATS, "bus disconnected"),
        (FaultKind.RESTART_REDIS, "the store does not answer; trying again for ever"),
        (FaultKind.KILL_SCHEDULER, "scheduler active"),
    ],
)
def test_what_tells_of_the_other_faults(kind: FaultKind, event: str) -> None:
    events = read_events("scheduler-2", _log(("11.000", "something else", {}), ("12.000", event, {})))
    assert noticed_after_s(kind, "scheduler-1", DONE_AT_S, events) == 2


def test_the_scheduler_that_was_killed_does_not_notice_it() -> None:
    events = read_events("scheduler-1", _log(("12.000", "scheduler active", {})))
    assert noticed_after_s(FaultKind.KILL_SCHEDULER, "scheduler-1", DONE_AT_S, events) is None


def test_who_is_active_and_who_stands_by() -> None:
    standby = "another scheduler is active; standing by"
    events = [
        *read_events("a", _log(("01.000", "scheduler active", {}), ("05.000", standby, {}))),
        *read_events("b", _log(("01.500", standby, {}), ("03.000", "scheduler active", {}))),
    ]
    assert active_scheduler(events, ["a", "b"]) == "b"
    assert active_scheduler(events, ["a"]) is None
    assert standing_by(events, "a", DONE_AT_S - 6)
    assert not standing_by(events, "a", DONE_AT_S - 4)
    taken_over = read_events("b", _log(("06.000", "another scheduler has taken over; standing by", {})))
    assert active_scheduler([*events, *taken_over], ["a", "b"]) is None


def _fault(kind: FaultKind, done_s: float, whole_s: float, noticed: float | None = 0.01) -> FaultSeen:
    return FaultSeen(
        kind=kind,
        target="w1",
        done_s=done_s,
        whole_s=whole_s,
        noticed_after_s=noticed,
        sent_bytes=0,
        was_warm=True,
        still_missing=None,
    )


def test_the_report_counts_streams_with_every_kind_of_fault_that_they_met() -> None:
    whole = _stream(number=1, arrivals=[1, 2, 6, 7])
    cut = _stream(number=2, arrivals=[1, 2, 3], problem="ended without [DONE]")
    late = _stream(number=3, accepted_s=20.0, arrivals=[21, 22, 23, 24])
    judged = judge([whole, cut, late], {0: ANSWER[:4]}, {0: True})
    faults = [
        _fault(FaultKind.KILL_TAIL, 2.5, 6.5),
        _fault(FaultKind.STOP_TAIL, 5.0, 6.5, noticed=None),
        _fault(FaultKind.HOLD_LINK, 50.0, 51.0),
    ]
    result = report(judged, faults, judge([late], {0: ANSWER[:4]}, {0: True}))
    assert (result["streams"], result["streams_cut"], result["tokens_lost"]) == (3, 1, 1)
    assert result["by_kind"]["kill-tail"]["streams_met"] == 2
    assert result["by_kind"]["kill-tail"]["streams_cut"] == 1
    assert result["by_kind"]["kill-tail"]["pause_max_s"] == 4
    assert result["by_kind"]["stop-tail"]["streams_met"] == 1
    assert result["by_kind"]["stop-tail"]["not_noticed"] == 1
    assert result["by_kind"]["hold-link"]["pause_p50_s"] is None
    assert len(result["problems"]) == 1
    assert "kill-tail at token 2" in result["problems"][0]
    assert not is_clean(result)
    assert is_clean(report(judge([whole], {0: ANSWER[:4]}, {0: True}), faults, []))


def test_a_report_is_json() -> None:
    json.dumps(report([], [_fault(FaultKind.RESTART_NATS, 1, 2)], []), allow_nan=False)


def test_a_text_that_is_different_is_told_apart_from_a_cut_one() -> None:
    result = report(judge([_stream(arrivals=[1, 2, 3])], {0: [1, 2, 3]}, {0: True}), [], [])
    assert (result["streams_cut"], result["texts_different"], result["texts_different_greedy"]) == (0, 1, 1)
    assert not math.isnan(result["tokens_other"])


def test_what_the_peers_clients_saw() -> None:
    whole = StreamSeen(num_tokens=10, wanted_tokens=10, ended_s=5.0, problem=None)
    cut = StreamSeen(num_tokens=4, wanted_tokens=10, ended_s=2.5, problem="the connection was closed")
    seen = judge_peer([whole, cut, cut], killed_s=2.0)
    assert (seen["streams"], seen["streams_cut"], seen["tokens_lost"]) == (3, 2, 12)
    assert seen["cut_after_max_s"] == 0.5
    assert seen["told"] == {"the connection was closed": 2}
    assert judge_peer([whole], killed_s=2.0)["cut_after_p50_s"] is None
