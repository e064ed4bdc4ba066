"""Pieces give the frames that were cut, and nothing else, whatever is lost between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink_common.errors import ProtocolError
from molink_common.pieces import Ack, Assembler, Piece, decode_ack, decode_piece
from molink_common.wire import Traffic

U32 = st.integers(0, 2**32 - 1)


def cut(step: int, frame: bytes, size: int) -> list[Piece]:
    return [
        Piece(pipeline=1, epoch=2, step=step, offset=at, total=len(frame), data=memoryview(frame)[at : at + size])
        for at in range(0, len(frame), size)
    ]


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=60), st.integers(1, 20)), max_size=6))
def test_frames_survive_being_cut(frames: list[tuple[bytes, int]]) -> None:
    assembler = Assembler()
    got = []
    for step, (frame, size) in enumerate(frames):
        for piece in cut(step, frame, size):
            again = decode_piece(bytes(piece.encode()))
            assert again == piece
            whole = assembler.add(again)
            if whole is not None:
                got.append(bytes(whole))
    assert got == [frame for frame, _ in frames]
    assert assembler.lost_frames == 0


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=60), st.integers(1, 20)), max_size=8),
    st.sets(st.integers(0, 40)),
)
def test_a_frame_that_misses_a_piece_is_lost_and_no_other(frames: list[tuple[bytes, int]], lost: set[int]) -> None:
    assembler = Assembler()
    got, expected, number = [], [], 0
    for step, (frame, size) in enumerate(frames):
        is_whole = True
        for piece in cut(step, frame, size):
            if number in lost:
                is_whole = False
            elif (whole := assembler.add(piece)) is not None:
                got.append(bytes(whole))
            number += 1
        if is_whole:
            expected.append(frame)
    assert got == expected


@given(U32, U32, st.integers(0, 2**64 - 1), U32, st.sampled_from(Traffic), st.integers(0, 2**64 - 1))
def test_an_acknowledgement_survives_the_round_trip(
    pipeline: int, epoch: int, step: int, end: int, traffic: Traffic, received_us: int
) -> None:
    ack = Ack(pipeline=pipeline, epoch=epoch, step=step, end=end, traffic=traffic, received_us=received_us)
    assert decode_ack(ack.encode()) == ack


@given(st.binary(max_size=80))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_piece(data)
    with pytest.raises(ProtocolError):
        decode_ack(data)


def test_a_piece_beyond_its_frame_is_refused() -> None:
    piece = Piece(pipeline=1, epoch=1, step=1, offset=8, total=9, data=memoryview(b"ab"))
    with pytest.raises(ProtocolError, match="of a frame of 9"):
        decode_piece(piece.encode())
