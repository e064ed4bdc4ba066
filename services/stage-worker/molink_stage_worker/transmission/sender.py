"""Which bytes go onto the link next.

    offer ──▶ decode queue ─────────────────────▶ next   whole, at once
          ──▶ bulk queue ──▶ window, link queue ─▶ next   in pieces
    on_ack ──▶ link estimator, link queue, window

Three policies:

* *adaptive*: decode frames at once and before bulk. Bulk in pieces of about half the allowed delay, each when what
  stands on the link is less than that delay, and never more under way than the window allows.
* *plain*: whole frames, first in first out, no window.
* *published*: as the MoLink paper (arXiv 2507.05043) has it: pieces of a fixed size and decode frames take strict
  turns under one window for both, computed from an assumed link speed.
"""

from __future__ import annotations

from collections import deque
from typing import assert_never

from molink_common.messages import Scheduling
from molink_common.wire import Traffic
from molink_stage_worker.transmission.link_estimator import LinkEstimator
from molink_stage_worker.transmission.link_queue import LinkQueue
from molink_stage_worker.transmission.under_way import UnderWay
from molink_stage_worker.transmission.values import Parcel, Send, SenderReport, SenderSettings
from molink_stage_worker.transmission.window import AdaptiveWindow, piece_bytes

_ACK_TIMEOUT_ROUND_TRIPS = 8
_MAX_TIMEOUT_DOUBLINGS = 3
_CLOCK_NOISE_S = 1e-6


class LinkSender:
    """The transmission scheduler of the link from one stage to the next. Every call costs microseconds.

    `now_s` is any clock that does not go back, the same in every call.
    """

    def __init__(
        self,
        scheduling: Scheduling,
        *,
        assumed_link_bytes_per_s: float,
        settings: SenderSettings = SenderSettings(),  # noqa: B008  frozen
    ) -> None:
        self.estimator = LinkEstimator()
        self._scheduling = scheduling
        self._settings = settings
        self._fixed_window_bytes = max(
            settings.published_min_window_bytes, int(assumed_link_bytes_per_s * settings.published_window_s)
        )
        self._whole: deque[Parcel] = deque()
        self._bulk: deque[Parcel] = deque()
        self._bulk_offset = 0
        self._queued_bytes = 0
        self._under_way = {traffic: UnderWay() for traffic in Traffic}
        self._window = AdaptiveWindow(settings)
        self._queue = LinkQueue(settings.decode_delay_s)
        self._is_bulks_turn = False
        self._bulk_wake_s: float | None = None
        self._decode_clear_at_s = float("-inf")
        """When the link will have taken the decode frames sent so far."""
        self._bulk_sent_at_s = float("-inf")
        self._ack_due_since_s: float | None = None
        self._last_round_trip_s = 0.0
        self._timeout_doublings = 0
        self._sent_bytes = 0
        self._written_off_bytes = 0

    def offer(self, parcel: Parcel, now_s: float) -> None:
        """Queue a frame. Frames of one class go in the order in which they are offered."""
        assert len(self._whole) + len(self._bulk) < self._settings.max_queued_frames, "nobody takes what is queued"
        is_cut = parcel.traffic is Traffic.BULK and self._scheduling is not Scheduling.PLAIN
        (self._bulk if is_cut else self._whole).append(parcel)
        self._queued_bytes += parcel.size_bytes

    def next(self, now_s: float) -> Send | None:
        """What to send now, taken as sent at `now_s`. None: nothing is queued, or it has to wait.

        Call it until None after `offer`, after `on_ack`, and at `wake_at_s`.
        """
        self._write_off_if_overdue(now_s)
        match self._scheduling:
            case Scheduling.ADAPTIVE:
                return self._next_adaptive(now_s)
            case Scheduling.PLAIN:
                return self._send_whole(now_s) if self._whole else None
            case Scheduling.PUBLISHED:
                return self._next_published(now_s)
        assert_never(self._scheduling)

    def on_ack(self, traffic: Traffic, step: int, end: int, received_us: int, now_s: float) -> None:
        """Everything of the class up to byte `end` of that step's frame has arrived, or never will.

        What is not under way (any more) is ignored.
        """
        taken = self._under_way[traffic].take(step, end)
        if not taken:
            return
        acknowledged = taken[-1]
        total_bytes = sum(entry.size_bytes for entry in taken)
        self.estimator.on_delivery(
            size_bytes=acknowledged.size_bytes,
            earlier_bytes=total_bytes - acknowledged.size_bytes,
            sent_s=acknowledged.sent_s,
            received_us=received_us,
            now_s=now_s,
            has_more=acknowledged.has_more,
        )
        rate = self.estimator.rate_bytes_per_s
        way_s = 0.0 if rate is None else self.estimator.way_s(rate)
        is_adaptive = self._scheduling is Scheduling.ADAPTIVE
        if is_adaptive and rate is not None:
            self._queue.on_ack(
                acknowledged,
                way_s=way_s,
                rate_bytes_per_s=rate,
                is_guess=self.estimator.is_app_limited,
                is_bulk=traffic is Traffic.BULK,
                now_s=now_s,
            )
        if not self._counts(traffic):
            return
        self._last_round_trip_s = now_s - acknowledged.sent_s
        self._timeout_doublings = 0
        self._ack_due_since_s = now_s if self._counted_bytes() else None
        if is_adaptive:
            self._window.on_ack(total_bytes, way_s, rate, self._queue)

    def on_cut_off(self) -> tuple[int, ...]:
        """Forget everything queued and under way: the steps whose frames were not wholly sent and acknowledged.

        What was learned of the link stays; the window begins anew.
        """
        steps = {parcel.step for parcel in (*self._whole, *self._bulk)}
        for under_way in self._under_way.values():
            steps |= under_way.clear()
        self._whole.clear()
        self._bulk.clear()
        self._bulk_offset = self._queued_bytes = 0
        self._is_bulks_turn = False
        self._ack_due_since_s = self._bulk_wake_s = None
        self._timeout_doublings = 0
        self._window.restart()
        self._queue.restart()
        self.estimator.forget_clock()
        return tuple(sorted(steps))

    def wake_at_s(self) -> float | None:
        """When to call `next` though nothing happens: a piece is to be paced, or an acknowledgement overdue."""
        overdue_s = None if self._ack_due_since_s is None else self._ack_due_since_s + self._ack_timeout_s()
        if self._bulk_wake_s is None:
            return overdue_s
        return self._bulk_wake_s if overdue_s is None else min(self._bulk_wake_s, overdue_s)

    def report(self) -> SenderReport:
        """The link and the queues, now."""
        windows = {
            Scheduling.ADAPTIVE: self._window.size_bytes,
            Scheduling.PLAIN: 0,
            Scheduling.PUBLISHED: self._fixed_window_bytes,
        }
        return SenderReport(
            round_trip_s=self.estimator.round_trip_s,
            rate_bytes_per_s=self.estimator.rate_bytes_per_s,
            standing_delay_s=self._queue.standing_delay_s,
            decode_delay_s=self._settings.decode_delay_s,
            window_bytes=windows[self._scheduling],
            under_way_bytes=self._counted_bytes(),
            queued_bytes=self._queued_bytes,
            sent_bytes=self._sent_bytes,
            unacknowledged_since_s=min(
                (one.oldest_s for one in self._under_way.values() if one.oldest_s is not None), default=None
            ),
            written_off_bytes=self._written_off_bytes,
        )

    def check_invariants(self) -> None:
        """For tests: the books agree, and the window is kept."""
        queued = sum(parcel.size_bytes for parcel in (*self._whole, *self._bulk)) - self._bulk_offset
        assert queued == self._queued_bytes, (queued, self._queued_bytes)
        assert self._bulk_offset >= 0 and (not self._bulk or self._bulk_offset < self._bulk[0].size_bytes)
        assert self._bulk or self._bulk_offset == 0
        for under_way in self._under_way.values():
            under_way.check_invariants()
        assert (self._ack_due_since_s is None) == (self._counted_bytes() == 0)

    # --- policies --------------------------------------------------------------------------------------------

    def _next_adaptive(self, now_s: float) -> Send | None:
        self._bulk_wake_s = None
        if self._whole:
            return self._send_whole(now_s)
        if not self._bulk:
            return None
        rate = self.estimator.rate_bytes_per_s
        size = self._cut(piece_bytes(rate, self._settings))
        under_way = self._under_way[Traffic.BULK].bytes
        if under_way and under_way + size > self._window.size_bytes:
            return None
        if rate is not None:
            at_s = self._bulk_may_go_at_s(size, rate, now_s)
            if now_s < at_s - _CLOCK_NOISE_S:
                self._bulk_wake_s = at_s
                return None
        self._bulk_sent_at_s = now_s
        return self._send_piece(size, now_s)

    def _next_published(self, now_s: float) -> Send | None:
        is_piece = bool(self._bulk) and (self._is_bulks_turn or not self._whole)
        if not is_piece and not self._whole:
            return None
        size = self._cut(self._settings.published_piece_bytes) if is_piece else self._whole[0].size_bytes
        under_way = self._counted_bytes()
        if under_way and under_way + size > self._fixed_window_bytes:
            return None
        self._is_bulks_turn = not is_piece
        return self._send_piece(size, now_s) if is_piece else self._send_whole(now_s)

    def _cut(self, most_bytes: int) -> int:
        """The next piece's size: the rest of the frame in equal pieces, so that none is tiny."""
        rest = self._bulk[0].size_bytes - self._bulk_offset
        return -(-rest // -(-rest // most_bytes))

    def _bulk_may_go_at_s(self, size_bytes: int, rate: float, now_s: float) -> float:
        """When the decode frames sent so far have left and there is room on the link, or bulk has waited for its share.

        On a link that shares itself out evenly, a piece sent next to a decode frame would take half of its time.
        """
        settings = self._settings
        transmission_s = size_bytes / rate
        allowed_s = max(settings.decode_delay_s, self._queue.noise_s)
        room_at_s = now_s + self._queue.wait_s(now_s) - max(0.0, allowed_s - transmission_s)
        cleared_at_s = self._decode_clear_at_s - settings.decode_delay_s / 4  # the piece is to find the link still busy
        return min(max(room_at_s, cleared_at_s), self._bulk_sent_at_s + transmission_s / settings.bulk_share)

    # --- sending ---------------------------------------------------------------------------------------------

    def _send_whole(self, now_s: float) -> Send:
        parcel = self._whole.popleft()
        send = self._sent(parcel, 0, parcel.size_bytes, now_s, whole=True)
        self._decode_clear_at_s = now_s + self._queue.wait_s(now_s)
        return send

    def _send_piece(self, size_bytes: int, now_s: float) -> Send:
        parcel, offset = self._bulk[0], self._bulk_offset
        self._bulk_offset += size_bytes
        if self._bulk_offset == parcel.size_bytes:
            self._bulk.popleft()
            self._bulk_offset = 0
        return self._sent(parcel, offset, size_bytes, now_s, whole=False)

    def _sent(self, parcel: Parcel, offset: int, size_bytes: int, now_s: float, *, whole: bool) -> Send:
        is_last = offset + size_bytes == parcel.size_bytes
        rate = self.estimator.rate_bytes_per_s
        foreseen_s = None if rate is None else self._queue.on_send(size_bytes, rate, now_s)
        self._under_way[parcel.traffic].add(
            step=parcel.step,
            end=offset + size_bytes,
            size_bytes=size_bytes,
            sent_s=now_s,
            has_more=bool(self._whole or self._bulk),
            foreseen_s=foreseen_s,
        )
        if self._ack_due_since_s is None and self._counts(parcel.traffic):
            self._ack_due_since_s = now_s
        self._queued_bytes -= size_bytes
        self._sent_bytes += size_bytes
        return Send(
            step=parcel.step, traffic=parcel.traffic, offset=offset, size_bytes=size_bytes, is_last=is_last, whole=whole
        )

    # --- the window's books ----------------------------------------------------------------------------------

    def _counts(self, traffic: Traffic) -> bool:
        """Whether the window counts this class."""
        match self._scheduling:
            case Scheduling.ADAPTIVE:
                return traffic is Traffic.BULK
            case Scheduling.PUBLISHED:
                return True
            case Scheduling.PLAIN:
                return False
        assert_never(self._scheduling)

    def _counted_bytes(self) -> int:
        return sum(under_way.bytes for traffic, under_way in self._under_way.items() if self._counts(traffic))

    def _ack_timeout_s(self) -> float:
        """Doubled each time that it passes in vain (RFC 6298)."""
        patience_s = _ACK_TIMEOUT_ROUND_TRIPS * max(self._last_round_trip_s, self.estimator.round_trip_s or 0.0)
        return max(self._settings.least_ack_timeout_s, patience_s) * float(1 << self._timeout_doublings)

    def _write_off_if_overdue(self, now_s: float) -> None:
        if self._ack_due_since_s is None or now_s < self._ack_due_since_s + self._ack_timeout_s():
            return
        for traffic, under_way in self._under_way.items():
            if self._counts(traffic):
                self._written_off_bytes += under_way.write_off()
        self._ack_due_since_s = None
        self._timeout_doublings = min(self._timeout_doublings + 1, _MAX_TIMEOUT_DOUBLINGS)
        self._window.restart()
        self._queue.restart()
