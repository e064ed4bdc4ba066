"""Which codec a frame takes."""

from __future__ import annotations

import random

import pytest

from molink_common.messages import LinkCodec
from molink_common.wire import Codec
from molink_stage_worker.codec_choice import CodecChoice

FRAME = 512 * 1024
"""32 tokens of 8192 in bfloat16."""
ENCODE_S_PER_BYTE = 0.6e-9
SHARE_LEFT = 0.69
MBIT = 125_000.0


def frames(
    choice: CodecChoice,
    count: int,
    *,
    size_bytes: int = FRAME,
    s_per_byte: float = ENCODE_S_PER_BYTE,
    share_left: float = SHARE_LEFT,
) -> list[Codec]:
    """The codecs of so many frames that go over a link which encodes at that cost."""
    codecs = []
    for _ in range(count):
        codec = choice.next(size_bytes)
        share = 1.0 if codec is Codec.RAW else share_left
        choice.on_encoded(size_bytes, round(size_bytes * share), size_bytes * s_per_byte)
        codecs.append(codec)
    return codecs


def at(rate_mbit: float) -> CodecChoice:
    choice = CodecChoice(LinkCodec.AUTO)
    choice.on_rate(rate_mbit * MBIT)
    return choice


@pytest.mark.parametrize("wanted", [LinkCodec.RAW, LinkCodec.LOSSLESS, LinkCodec.INT8])
def test_what_is_wanted_by_name_is_taken_whatever_it_costs(wanted: LinkCodec) -> None:
    choice = CodecChoice(wanted)
    assert choice.latest.name.lower() == wanted
    for rate in (None, 0.1 * MBIT, 1e6 * MBIT):
        choice.on_rate(rate)
        assert {codec.name.lower() for codec in frames(choice, 100, s_per_byte=1.0)} == {wanted}


def test_a_link_that_nobody_has_measured_is_not_encoded_for() -> None:
    choice = CodecChoice(LinkCodec.AUTO)
    assert (choice.latest, choice.share_left) == (Codec.RAW, 1.0)
    assert set(frames(choice, 100)) == {Codec.RAW}
    choice.on_rate(None)
    assert set(frames(choice, 100)) == {Codec.RAW}


@pytest.mark.parametrize("rate_mbit", [1.0, 10.0, 100.0])
def test_a_slow_link_gets_lossless_frames(rate_mbit: float) -> None:
    choice = at(rate_mbit)
    assert set(frames(choice, 100)) == {Codec.LOSSLESS}
    assert choice.share_left == pytest.approx(SHARE_LEFT, abs=0.01)
    choice.on_rate(None)  # idle for a while
    assert set(frames(choice, 100)) == {Codec.LOSSLESS}


def test_a_fast_link_gets_raw_frames_and_a_few_trials() -> None:
    choice = at(10_000.0)
    codecs = frames(choice, 1000)
    assert codecs.count(Codec.LOSSLESS) in range(20, 40)
    assert choice.share_left > 0.9


def test_it_follows_the_link() -> None:
    choice = at(10_000.0)
    frames(choice, 100)
    choice.on_rate(20 * MBIT)
    assert set(frames(choice, 100)) == {Codec.LOSSLESS}
    choice.on_rate(10_000 * MBIT)
    assert frames(choice, 100).count(Codec.RAW) > 90


def test_small_frames_are_judged_by_what_small_frames_cost() -> None:
    choice = at(100.0)
    for _ in range(50):
        large = frames(choice, 1)
        small = frames(choice, 1, size_bytes=1152, s_per_byte=8e-9)
    assert large == [Codec.LOSSLESS]
    assert small == [Codec.RAW]


def test_what_does_not_get_shorter_goes_raw() -> None:
    choice = at(1.0)
    assert frames(choice, 100, share_left=1.0).count(Codec.RAW) > 90


def test_an_interruption_changes_little_and_a_first_slow_one_is_made_up_for() -> None:
    choice = at(100.0)
    frames(choice, 10)
    frames(choice, 1, s_per_byte=1e-6)  # half a second
    assert set(frames(choice, 100)) == {Codec.LOSSLESS}
    choice = at(100.0)
    frames(choice, 1, s_per_byte=20 * ENCODE_S_PER_BYTE)
    assert frames(choice, 2000)[-1] is Codec.LOSSLESS


def test_empty_frames_go_raw() -> None:
    assert at(1.0).next(0) is Codec.RAW


def test_noise_of_a_half_does_not_shake_it() -> None:
    rng = random.Random(5)
    choice = at(100.0)
    codecs = [frames(choice, 1, s_per_byte=ENCODE_S_PER_BYTE * rng.lognormvariate(0, 0.5))[0] for _ in range(2000)]
    assert codecs.count(Codec.LOSSLESS) > 1980
