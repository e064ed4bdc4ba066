"""What each policy sends, call by call."""

from __future__ import annotations

import pytest

from molink_common.messages import Scheduling
from molink_common.wire import Traffic
from molink_stage_worker.transmission import LinkSender, Parcel, Send, SenderSettings

KIB = 1024


def make_sender(scheduling: Scheduling) -> LinkSender:
    return LinkSender(scheduling, assumed_link_bytes_per_s=12.5e6)


def offer(sender: LinkSender, step: int, traffic: Traffic, size_bytes: int, now_s: float = 0.0) -> None:
    sender.offer(Parcel(step=step, traffic=traffic, size_bytes=size_bytes), now_s)


def drain(sender: LinkSender, now_s: float = 0.0) -> list[Send]:
    sends = []
    while (send := sender.next(now_s)) is not None:
        sends.append(send)
    return sends


def test_adaptive_sends_decode_at_once_and_bulk_up_to_the_window() -> None:
    sender = make_sender(Scheduling.ADAPTIVE)
    offer(sender, 1, Traffic.BULK, 1024 * KIB)
    sends = drain(sender)
    assert [send.offset for send in sends] == [index * 16 * KIB for index in range(8)]
    assert not any(send.whole or send.is_last for send in sends)
    offer(sender, 2, Traffic.DECODE, 200 * KIB)
    assert drain(sender) == [
        Send(step=2, traffic=Traffic.DECODE, offset=0, size_bytes=200 * KIB, is_last=True, whole=True)
    ]


def test_adaptive_decode_goes_before_bulk_that_came_earlier() -> None:
    sender = make_sender(Scheduling.ADAPTIVE)
    offer(sender, 1, Traffic.BULK, 20 * KIB)
    offer(sender, 2, Traffic.DECODE, 100)
    offer(sender, 3, Traffic.DECODE, 100)
    assert [(send.step, send.size_bytes, send.is_last, send.whole) for send in drain(sender)] == [
        (2, 100, True, True),
        (3, 100, True, True),
        (1, 10 * KIB, False, False),  # two equal pieces, not a large and a tiny one
        (1, 10 * KIB, True, False),
    ]


def test_an_acknowledgement_settles_everything_before_it_and_opens_the_window() -> None:
    sender = make_sender(Scheduling.ADAPTIVE)
    offer(sender, 1, Traffic.BULK, 1024 * KIB)
    drain(sender)
    sender.on_ack(Traffic.BULK, 1, 64 * KIB, 5_000_000, 0.040)
    assert sender.report().under_way_bytes == 64 * KIB
    assert len(drain(sender, 0.040)) >= 4
    before = sender.report()
    sender.on_ack(Traffic.BULK, 1, 64 * KIB, 5_000_000, 0.050)
    sender.on_ack(Traffic.BULK, 1, 12345, 5_000_000, 0.050)
    sender.on_ack(Traffic.DECODE, 1, 128 * KIB, 5_000_000, 0.050)
    assert sender.report() == before


def test_plain_sends_whole_frames_first_in_first_out() -> None:
    sender = make_sender(Scheduling.PLAIN)
    offer(sender, 1, Traffic.BULK, 32 * KIB * KIB)
    offer(sender, 2, Traffic.DECODE, 100)
    assert [(send.step, send.size_bytes, send.whole, send.is_last) for send in drain(sender)] == [
        (1, 32 * KIB * KIB, True, True),
        (2, 100, True, True),
    ]
    assert sender.wake_at_s() is None


def test_published_takes_turns_and_makes_decode_wait_for_the_window() -> None:
    sender = make_sender(Scheduling.PUBLISHED)
    offer(sender, 1, Traffic.BULK, 1024 * KIB)
    for step in range(2, 8):
        offer(sender, step, Traffic.DECODE, 16 * KIB)
    sends = drain(sender)
    assert [send.step for send in sends] == [2, 1, 3, 1, 4, 1, 5, 1, 6, 1, 7, 1]
    assert {send.size_bytes for send in sends if send.step == 1} == {64 * KIB}
    assert sender.report().window_bytes == 512 * KIB
    offer(sender, 9, Traffic.DECODE, 16 * KIB)
    offer(sender, 10, Traffic.DECODE, 64 * KIB)
    assert [send.step for send in drain(sender)] == [9], "bulk's turn is next, and its piece does not fit"
    sender.on_ack(Traffic.BULK, 1, 128 * KIB, 0, 0.1)
    assert [send.step for send in drain(sender, 0.1)] == [1, 10]


def test_published_window_comes_from_the_assumed_link() -> None:
    sender = LinkSender(Scheduling.PUBLISHED, assumed_link_bytes_per_s=125e6)
    assert sender.report().window_bytes == 5_000_000


@pytest.mark.parametrize("scheduling", [Scheduling.ADAPTIVE, Scheduling.PUBLISHED])
def test_without_acknowledgements_what_is_under_way_is_written_off_ever_more_slowly(scheduling: Scheduling) -> None:
    sender = make_sender(scheduling)
    offer(sender, 1, Traffic.BULK, 8 * KIB * KIB)
    drain(sender)
    waits, now_s = [], 0.0
    for _ in range(6):
        wake_s = sender.wake_at_s()
        assert wake_s is not None
        assert sender.next(wake_s - 0.001) is None
        waits.append(wake_s - now_s)
        now_s = wake_s
        assert drain(sender, now_s)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert sender.report().written_off_bytes > 0


def test_a_late_acknowledgement_is_understood_and_takes_nothing_off_twice() -> None:
    sender = make_sender(Scheduling.ADAPTIVE)
    offer(sender, 1, Traffic.BULK, 1024 * KIB)
    drain(sender)
    drain(sender, 1.0)
    assert sender.report().under_way_bytes == 128 * KIB
    sender.on_ack(Traffic.BULK, 1, 128 * KIB, 0, 1.5)
    assert sender.report().under_way_bytes == 128 * KIB
    assert sender.report().round_trip_s == 1.5
    sender.check_invariants()


def test_being_cut_off_names_what_was_not_wholly_delivered() -> None:
    sender = make_sender(Scheduling.ADAPTIVE)
    for step, traffic in enumerate([Traffic.DECODE, Traffic.DECODE, Traffic.BULK, Traffic.BULK, Traffic.BULK], start=1):
        offer(sender, step, traffic, 100 * KIB)
    drain(sender)
    sender.on_ack(Traffic.DECODE, 1, 100 * KIB, 0, 0.1)
    sender.on_ack(Traffic.BULK, 3, 100 * KIB, 0, 0.1)
    assert sender.on_cut_off() == (2, 4, 5)
    assert sender.next(0.2) is None
    assert sender.report().under_way_bytes == 0
    assert sender.report().round_trip_s == 0.1
    assert sender.on_cut_off() == ()


def test_once_the_rate_is_known_a_burst_after_a_pause_is_paced() -> None:
    settings = SenderSettings(start_window_bytes=1024 * KIB)
    sender = LinkSender(Scheduling.ADAPTIVE, assumed_link_bytes_per_s=12.5e6, settings=settings)
    offer(sender, 1, Traffic.BULK, 1024 * KIB)
    for index, send in enumerate(drain(sender), start=1):
        arrived_s = 0.015 + index * 16 * KIB / 12.5e6
        sender.on_ack(send.traffic, 1, send.offset + send.size_bytes, round(arrived_s * 1e6), arrived_s + 0.015)
    assert sender.report().rate_bytes_per_s == pytest.approx(12.5e6, rel=0.02)
    offer(sender, 2, Traffic.BULK, 1024 * KIB, 9.0)
    first = drain(sender, 9.0)
    assert sum(send.size_bytes for send in first) <= 256 * KIB, "a quarter of the window: what goes in 20 ms"
    wake_s = sender.wake_at_s()
    assert wake_s is not None
    assert 9.0 < wake_s < 9.0 + 0.02
    assert sender.next(wake_s) is not None


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_a_frame_has_bytes(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Parcel(step=1, traffic=Traffic.BULK, size_bytes=size_bytes)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="pieces"):
        SenderSettings(min_piece_bytes=128 * KIB)
    with pytest.raises(ValueError, match="windows"):
        SenderSettings(start_window_bytes=64 * KIB)
    with pytest.raises(ValueError, match="share"):
        SenderSettings(bulk_share=0.0)
