"""What goes into the transmission scheduler of a link, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.wire import Traffic

KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderSettings:
    """What is wanted of a link. Nothing here depends on how fast the link is."""

    decode_delay_s: float = 0.006
    """How long bulk may keep a decode frame waiting: the queue that bulk is allowed to keep on the link."""
    bulk_share: float = 0.1
    """Of the link's rate, what bulk may have under way whatever decode does."""
    start_window_bytes: int = 128 * KIB
    max_window_bytes: int = 16 * KIB * KIB
    min_piece_bytes: int = 4 * KIB
    max_piece_bytes: int = 64 * KIB
    first_piece_bytes: int = 16 * KIB
    """Until the rate is known."""
    published_piece_bytes: int = 64 * KIB
    published_window_s: float = 0.040
    published_min_window_bytes: int = 512 * KIB
    least_ack_timeout_s: float = 1.0
    max_queued_frames: int = 16384

    def __post_init__(self) -> None:
        if not 0 < self.min_piece_bytes <= self.first_piece_bytes <= self.max_piece_bytes:
            raise ValueError("pieces: least ≤ first ≤ most")
        if not 2 * self.max_piece_bytes <= self.start_window_bytes <= self.max_window_bytes:
            raise ValueError("windows: two of the largest pieces ≤ start ≤ most")
        if not (0 < self.decode_delay_s < self.least_ack_timeout_s and 0 < self.bulk_share <= 1):
            raise ValueError("the decode delay lies between 0 and the acknowledgement's timeout, the share in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A frame to send."""

    step: int
    traffic: Traffic
    size_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes < 1:
            raise ValueError(f"a frame of {self.size_bytes} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Publish now: bytes ``[offset, offset + size_bytes)`` of the step's frame."""

    step: int
    traffic: Traffic
    offset: int
    size_bytes: int
    is_last: bool
    whole: bool
    """As one frame on the decode subject, not as a piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderReport:
    """How a link does. None: not known yet."""

    round_trip_s: float | None
    """The least lately, of a frame and its acknowledgement."""
    rate_bytes_per_s: float | None
    standing_delay_s: float | None
    """The queue that bulk keeps on the link, as last measured."""
    decode_delay_s: float
    """How long that queue is allowed to be."""
    window_bytes: int
    """How much may be under way; 0: the policy has no window."""
    under_way_bytes: int
    """Of the classes that the window counts."""
    queued_bytes: int
    """Waiting to be sent, of both classes."""
    sent_bytes: int
    unacknowledged_since_s: float | None
    """When the oldest message was sent of which nothing is known; None: all has arrived."""
    written_off_bytes: int
    """Taken as gone, because no acknowledgement came."""
