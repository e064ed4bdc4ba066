"""Pieces of bulk frames on a link, and the acknowledgements that come back.

A frame of class bulk crosses a link as pieces of a few ten KiB, one after the other; the receiver puts them together
again. It acknowledges every piece and every decode frame, so that the sender knows how much is under way, how long
the way takes and how fast the link is. Little-endian, fixed headers:

    piece  │ magic version kind │ pipeline epoch step │ offset total │ bytes of the frame from offset on
    ack    │ magic version kind │ pipeline epoch step │ end traffic  │ received_us, by the receiver's clock

Pieces of one link come in order. A piece that does not continue the frame before it ends that frame: it is lost.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from molink_common import PROTOCOL_VERSION
from molink_common.errors import ProtocolError
from molink_common.wire import Traffic

_MAGIC = b"ML"
_PIECE_KIND, _ACK_KIND = 1, 2
_PIECE = struct.Struct("<2sBBIIQII")
_ACK = struct.Struct("<2sBBIIQIIQ")
PIECE_HEADER_BYTES = _PIECE.size
MAX_FRAME_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`data` is the frame's bytes ``[offset, offset + len(data))`` of `total`."""

    pipeline: int
    epoch: int
    step: int
    offset: int
    total: int
    data: memoryview

    def encode(self) -> bytearray:
        """Ready to publish."""
        out = bytearray(_PIECE.size + len(self.data))
        _PIECE.pack_into(
            out, 0, _MAGIC, PROTOCOL_VERSION, _PIECE_KIND, self.pipeline, self.epoch, self.step, self.offset, self.total
        )
        out[_PIECE.size :] = self.data
        return out


def decode_piece(data: bytes | memoryview) -> Piece:
    """The piece in `data`, a view of it.

    Raises:
        ProtocolError: it is none, or its numbers contradict each other.
    """
    view = memoryview(data)
    if len(view) <= _PIECE.size:
        raise ProtocolError(f"a piece of {len(view)} bytes holds nothing")
    magic, version, kind, pipeline, epoch, step, offset, total = _PIECE.unpack_from(view)
    if (magic, version, kind) != (_MAGIC, PROTOCOL_VERSION, _PIECE_KIND):
        raise ProtocolError("not a piece of this version")
    body = view[_PIECE.size :]
    if total > MAX_FRAME_BYTES or offset + len(body) > total:
        raise ProtocolError(f"a piece of {len(body)} bytes at {offset} of a frame of {total}")
    return Piece(pipeline=pipeline, epoch=epoch, step=step, offset=offset, total=total, data=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Everything of a class up to byte `end` of this step's frame has arrived, or never will."""

    pipeline: int
    epoch: int
    step: int
    end: int
    traffic: Traffic
    received_us: int
    """By the receiver's own clock: only differences mean something."""

    def encode(self) -> bytes:
        """Ready to publish."""
        return _ACK.pack(
            _MAGIC, PROTOCOL_VERSION, _ACK_KIND, self.pipeline, self.epoch, self.step, self.end, self.traffic,
            self.received_us,
        )  # fmt: skip


def decode_ack(data: bytes | memoryview) -> Ack:
    """The inverse of `Ack.encode`.

    Raises:
        ProtocolError: it is none.
    """
    if len(data) != _ACK.size:
        raise ProtocolError(f"an acknowledgement of {len(data)} bytes")
    magic, version, kind, pipeline, epoch, step, end, traffic, received_us = _ACK.unpack(data)
    if (magic, version, kind) != (_MAGIC, PROTOCOL_VERSION, _ACK_KIND) or traffic > Traffic.BULK:
        raise ProtocolError("not an acknowledgement of this version")
    return Ack(pipeline=pipeline, epoch=epoch, step=step, end=end, traffic=Traffic(traffic), received_us=received_us)


class Assembler:
    """Puts the frames of one link together again. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._total = 0
        self._buffer = bytearray()
        self.lost_frames = 0
        """Frames that ended before their last piece came."""

    def add(self, piece: Piece) -> bytearray | None:
        """The whole frame if this was its last piece. The buffer is the caller's."""
        if piece.offset == 0:
            self._give_up()
            self._step, self._total = piece.step, piece.total
        elif (piece.step, piece.offset, piece.total) != (self._step, len(self._buffer), self._total):
            self._give_up()
            return None
        self._buffer += piece.data
        if len(self._buffer) < piece.total:
            return None
        whole = self._buffer
        self._step, self._buffer = None, bytearray()
        return whole

    def _give_up(self) -> None:
        if self._step is not None:
            self.lost_frames += 1
            self._step, self._buffer = None, bytearray()
