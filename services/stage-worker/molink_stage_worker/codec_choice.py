"""Which codec the next frame of a link takes. No clock, no IO: what was measured comes in, a codec goes out.

`LinkCodec.AUTO` chooses between the two exact ones: lossless where the time that its fewer bytes save on the link is
well above the time that encoding and decoding them take, raw otherwise and while the link's rate is unknown. What
encoding takes and saves is measured for each size of frame, since small ones pay mostly for the call.
"""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.messages import LinkCodec
from molink_common.wire import Codec

_CODECS = {LinkCodec.RAW: Codec.RAW, LinkCodec.LOSSLESS: Codec.LOSSLESS, LinkCodec.INT8: Codec.INT8}
_BOTH_ENDS = 2.0
"""Decoding is taken to cost what encoding does; it costs a little less."""
_WORTH = 4.0
"""How many times its cost a codec is to save: a link's time is one of several things that may hold tokens up, a
processor's time is lost in any case."""
_TRY_FRAMES = 32
"""What is never run stays misjudged: where raw is chosen, one frame of a size in so many is encoded all the same."""
_GAIN = 0.1
_OUTLIER = 2.0
"""Times what is usual: a thread that was put aside in between says no more than that."""


@dataclass(slots=True)
class _Cost:
    """Of encoding a frame of about one size."""

    s_per_byte: float
    share_left: float
    refusals: int = 0


class CodecChoice:
    """Of one link. `on_rate` and `share_left` are for the event loop, the rest for the compute thread."""

    def __init__(self, wanted: LinkCodec) -> None:
        self._fixed = None if wanted is LinkCodec.AUTO else _CODECS[wanted]
        self._rate_bytes_per_s: float | None = None
        self._costs: dict[int, _Cost] = {}
        self._hidden_bytes = self._link_bytes = 0.0
        self._share_left = 1.0
        self._latest = Codec.RAW if self._fixed is None else self._fixed

    @property
    def latest(self) -> Codec:
        """Of the newest frame."""
        return self._latest

    @property
    def share_left(self) -> float:
        """Bytes on the link for each byte of hidden states, lately."""
        return self._share_left

    def on_rate(self, rate_bytes_per_s: float | None) -> None:
        """What the link carries. None: it was not busy enough to tell, so what it carried last is taken to hold."""
        if rate_bytes_per_s is not None:
            self._rate_bytes_per_s = rate_bytes_per_s

    def next(self, size_bytes: int) -> Codec:
        """For hidden states of so many bytes."""
        self._latest = self._chosen(size_bytes) if self._fixed is None else self._fixed
        return self._latest

    def on_encoded(self, size_bytes: int, encoded_bytes: int, took_s: float) -> None:
        """How it went with the codec that `next` gave. `took_s` is not looked at for raw ones."""
        self._hidden_bytes += size_bytes - _GAIN * self._hidden_bytes
        self._link_bytes += encoded_bytes - _GAIN * self._link_bytes
        self._share_left = self._link_bytes / self._hidden_bytes  # as one number: the event loop may look at any moment
        if self._fixed is not None or self._latest is Codec.RAW:
            return
        share = encoded_bytes / size_bytes
        known = self._costs.get(_size_class(size_bytes))
        if known is None:
            self._costs[_size_class(size_bytes)] = _Cost(s_per_byte=took_s / size_bytes, share_left=share)
            return
        s_per_byte = min(took_s / size_bytes, _OUTLIER * known.s_per_byte)
        known.s_per_byte += _GAIN * (s_per_byte - known.s_per_byte)
        known.share_left += _GAIN * (share - known.share_left)

    def _chosen(self, size_bytes: int) -> Codec:
        if self._rate_bytes_per_s is None or not size_bytes:
            return Codec.RAW
        cost = self._costs.get(_size_class(size_bytes))
        if cost is None:
            return Codec.LOSSLESS
        saved_s = (1.0 - cost.share_left) / self._rate_bytes_per_s
        if saved_s >= _WORTH * _BOTH_ENDS * cost.s_per_byte:
            return Codec.LOSSLESS
        cost.refusals += 1
        return Codec.RAW if cost.refusals % _TRY_FRAMES else Codec.LOSSLESS


def _size_class(size_bytes: int) -> int:
    """Sizes within a factor of two cost about the same a byte."""
    return size_bytes.bit_length()
