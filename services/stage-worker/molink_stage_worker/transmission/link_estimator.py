"""How fast a link is and how long its way, from deliveries that the receiver acknowledged.

Rate: bytes over time in spans in which the link was never idle. A frame that was sent before the one ahead of it had
left the link followed it without a gap; whether it did is seen from the least time between sending and receiving
(the two clocks' difference is part of that number, and cancels out). What is left open by that, a stream too thin to
keep the link busy, can only raise the estimate. This is the delivery rate of BBR (Cardwell et al., "BBR: Congestion-
Based Congestion Control", 2016), taken at the receiver; an upper quantile of the latest samples stands in for its
maximum, so that one wrong sample does not rule for seconds and a link that became slower is noticed.

Round trip: the least of the last seconds.

A receiver that is slow to look at what has come (a busy machine) makes frames follow one another as if the link were
busy, and a thin stream then passes for all that the link carries. So what was measured while the sender had more to
send goes before the rest; and where there is only the rest, frames that come through quickly prove it wrong: the link
carries at least a frame's bytes in that time.

A sender that is paced by a rate sends no faster, and may measure nothing but that rate again, however wrong it is: the
way is then taken for shorter, by what large frames are thought to take, and small pieces for late. What cannot be
explained so is a large frame that takes no longer than the quickest of the small ones: it shows what the link carries.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

_ROUND_TRIP_WINDOW_S = 20.0
_ONE_WAY_WINDOW_S = 10.0
"""Short, because the two clocks drift against each other."""
_OTHER_CLOCK_S = 60.0
"""A receiver's clock that jumps so far is another clock, or the time on one message is wrong."""
_LARGE_BYTES = 4096
"""As pieces of bulk are."""
_SLOTS = 8
_SAMPLES = 16
_QUANTILE = 0.7
_SAMPLE_AGE_S = 30.0
_LEAST_SPAN_S = 0.050
_SHORT_SPAN_S = 0.002
_SHORT_SPAN_BYTES = 32768
_UNKNOWN_RATE_SLACK_S = 0.001
_MOST_SLACK_S = 0.005
_PROOF_WINDOW_S = 10.0
_DISPROOF_WINDOW_S = 1.0
"""A link may have become slower since."""
_NOISE_SHARE = 1 / 8
"""Of the way: the quickest frame may have been so much slower than others for no reason."""
_LEAST_PROOF = 2.0
"""Times the measured rate: a frame that waited for a little while where a larger one did not seems to prove less."""
_LEAST_DISPROOF = 4.0
"""The same where the sender had more to send: small pieces may all have waited in the queue that bulk keeps."""
_SMALL_BYTES = 8192
_LEAST_PROOF_S = 0.004
"""Shorter times are within what a loop's clock and its turns blur."""


@dataclass(frozen=True, slots=True)
class LeastDelay:
    """The least delay of a while, with the size of the message that had it and the rate that was known then."""

    seconds: float
    size_bytes: int
    rate_bytes_per_s: float | None

    def without_its_bytes_s(self, rate_bytes_per_s: float) -> float:
        """What is left of it without the message's own transmission."""
        return max(0.0, self.seconds - self.size_bytes / rate_bytes_per_s)


class WindowedMinimum:
    """The least delay of the last `window_s`, to an eighth of that. Constant size and cost."""

    def __init__(self, window_s: float) -> None:
        self._slot_s = window_s / _SLOTS
        self._slots: deque[tuple[int, LeastDelay]] = deque()

    def add(self, seconds: float, size_bytes: int, rate_bytes_per_s: float | None, now_s: float) -> LeastDelay:
        """The least with this one."""
        slot = int(now_s / self._slot_s)
        slots = self._slots
        if slots and slot - slots[0][0] > _SLOTS:
            slots.popleft()
        if not slots or seconds <= slots[-1][1].seconds or slot != slots[-1][0]:
            while slots and slots[-1][1].seconds >= seconds:
                slots.pop()
            slots.append((slot, LeastDelay(seconds, size_bytes, rate_bytes_per_s)))
        return slots[0][1]

    @property
    def least(self) -> LeastDelay | None:
        """As of the latest `add`."""
        return self._slots[0][1] if self._slots else None


class _TwoLargest:
    """The second largest value of the last `window_s`, to an eighth of that. Constant size and cost."""

    def __init__(self, window_s: float) -> None:
        self._slot_s = window_s / _SLOTS
        self._slots: deque[tuple[int, float, float]] = deque()

    def add(self, value: float, now_s: float) -> None:
        slot = int(now_s / self._slot_s)
        while self._slots and slot - self._slots[0][0] > _SLOTS:
            self._slots.popleft()
        if not self._slots or self._slots[-1][0] != slot:
            self._slots.append((slot, value, 0.0))
            return
        _, first, second = self._slots[-1]
        self._slots[-1] = (slot, max(first, value), max(second, min(first, value)))

    @property
    def second(self) -> float:
        """As of the latest `add`; 0 when there were not two."""
        values = sorted((value for _, *pair in self._slots for value in pair), reverse=True)
        return values[1] if len(values) > 1 else 0.0


class LinkEstimator:
    """Learns from `on_delivery`; holds a few numbers however long it runs."""

    def __init__(self) -> None:
        self._round_trips = WindowedMinimum(_ROUND_TRIP_WINDOW_S)
        self._large_round_trips = WindowedMinimum(_ROUND_TRIP_WINDOW_S)
        self._one_way = WindowedMinimum(_ONE_WAY_WINDOW_S)
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._are_driven = False
        """Whether the samples are of spans in which there was more to send all the time."""
        self._driven_bytes = 0
        self._short_samples: deque[float] = deque(maxlen=_SAMPLES)
        self._rate: float | None = None
        self._received_s: float | None = None
        self._busy_since_s = 0.0
        self._busy_bytes = 0
        self._thin_since_s = 0.0
        self._thin_bytes = 0
        self._faster_rate: float | None = None
        self._proofs = _TwoLargest(_PROOF_WINDOW_S)
        self._small_round_trips = WindowedMinimum(_ROUND_TRIP_WINDOW_S)
        self._disproofs = _TwoLargest(_DISPROOF_WINDOW_S)

    @property
    def rate_bytes_per_s(self) -> float | None:
        """What the link carries when it is never idle, or what single frames lately prove it to carry."""
        if self._rate is None:
            return None
        # the second: one alone may be a wrong time
        if self.is_app_limited:
            proven, least = self._proofs.second, _LEAST_PROOF
        else:
            proven, least = self._disproofs.second, _LEAST_DISPROOF
        return proven if proven >= least * self._rate else self._rate

    @property
    def is_rate_certain(self) -> bool:
        """Whether the link was busy long enough, lately, to trust the rate."""
        return bool(self._samples)

    @property
    def is_app_limited(self) -> bool:
        """Whether the rate is only what was used by a sender that had no more to send (BBR's word): a lower bound."""
        return not (self._samples and self._are_driven)

    def way_s(self, rate_bytes_per_s: float) -> float:
        """There and back, for a message without bytes that waits for nothing; 0 before the first delivery.

        The quickest message may have met a queue that a large one, for all its bytes, did not: both are asked.
        """
        quickest = (self._round_trips.least, self._large_round_trips.least)
        return min((one.without_its_bytes_s(rate_bytes_per_s) for one in quickest if one is not None), default=0.0)

    @property
    def round_trip_s(self) -> float | None:
        """The least round trip lately."""
        base = self._round_trips.least
        return None if base is None else base.seconds

    def on_delivery(
        self,
        *,
        size_bytes: int,
        sent_s: float,
        received_us: int,
        now_s: float,
        has_more: bool,
        earlier_bytes: int = 0,
    ) -> None:
        """A message that was sent at `sent_s` arrived at `received_us` by the receiver's clock.

        `has_more`: something else waited to be sent behind it. `earlier_bytes` arrived some time before it,
        unacknowledged.
        """
        received_s = received_us / 1e6
        known = self._one_way.least
        if known is not None and abs(received_s - sent_s - known.seconds) > _OTHER_CLOCK_S:
            self.forget_clock()
        round_trip_s = now_s - sent_s
        base = self._round_trips.add(round_trip_s, size_bytes, self._rate, now_s)
        if size_bytes >= _LARGE_BYTES:
            self._large_round_trips.add(round_trip_s, size_bytes, self._rate, now_s)
        self._prove(size_bytes, round_trip_s, base, now_s)
        least = self._one_way.add(received_s - sent_s, size_bytes, self._rate, now_s)
        before_s = self._received_s
        if before_s is None:
            self._thin_since_s = received_s
        else:
            received_s = max(received_s, before_s)
            self._thin_bytes += size_bytes + earlier_bytes
        if before_s is not None and before_s - sent_s >= least.seconds - self._slack_s(least):
            self._busy_bytes += size_bytes + earlier_bytes
            self._driven_bytes += has_more * (size_bytes + earlier_bytes)
        else:
            if before_s is not None:
                self._measure_short(before_s - self._busy_since_s, now_s)
            self._busy_since_s = min(received_s, sent_s + least.seconds)
            self._busy_bytes = max(0, size_bytes - least.size_bytes)
            self._driven_bytes = has_more * self._busy_bytes
        self._received_s = received_s
        self._measure(received_s, now_s)

    def _prove(self, size_bytes: int, round_trip_s: float, base: LeastDelay, now_s: float) -> None:
        """All of its bytes went in this time, and those that the quickest frame had not, in what it took longer."""
        more_bytes = max(size_bytes - base.size_bytes, 0)
        longer_s = max(round_trip_s - base.seconds * (1 - _NOISE_SHARE), _LEAST_PROOF_S)
        self._proofs.add(max(size_bytes / max(round_trip_s, _LEAST_PROOF_S), more_bytes / longer_s), now_s)
        if size_bytes < _SMALL_BYTES:
            self._small_round_trips.add(round_trip_s, size_bytes, self._rate, now_s)
        elif (small := self._small_round_trips.least) is not None:
            longer_s = max(round_trip_s - small.seconds, _LEAST_PROOF_S)
            self._disproofs.add((size_bytes - small.size_bytes) / longer_s, now_s)

    def forget_clock(self) -> None:
        """The receiver may be another one from here on: its clock cannot be compared with what came before."""
        self._one_way = WindowedMinimum(_ONE_WAY_WINDOW_S)
        self._received_s = None
        self._busy_bytes = self._driven_bytes = self._thin_bytes = 0

    def _slack_s(self, least: LeastDelay) -> float:
        """What the least delay holds of its own message's transmission."""
        if self._rate is None:
            return _UNKNOWN_RATE_SLACK_S
        return min(_MOST_SLACK_S, least.size_bytes / (least.rate_bytes_per_s or self._rate))

    def _measure(self, received_s: float, now_s: float) -> None:
        span_s = max(_LEAST_SPAN_S, self.round_trip_s or 0.0)
        busy_s = received_s - self._busy_since_s
        if busy_s >= span_s and self._busy_bytes > 0:
            self._add_sample(self._busy_bytes / busy_s, now_s, is_driven=2 * self._driven_bytes > self._busy_bytes)
            self._busy_since_s, self._busy_bytes, self._driven_bytes = received_s, 0, 0
        elif self._rate is None:
            self._measure_short(busy_s, now_s)
        thin_s = received_s - self._thin_since_s
        if thin_s >= span_s:
            self._measure_thin(self._thin_bytes / thin_s, now_s)
            self._thin_since_s, self._thin_bytes = received_s, 0

    def _measure_thin(self, rate: float, now_s: float) -> None:
        """Two spans in a row that carried more than the link was thought to carry: what was learned is outdated."""
        if self._rate is None or rate <= self._rate:
            self._faster_rate = None
        elif self._faster_rate is None:
            self._faster_rate = rate
        else:
            self._samples.clear()
            self._add_sample(min(rate, self._faster_rate), now_s, is_driven=self._are_driven)
            self._faster_rate = None

    def _measure_short(self, busy_s: float, now_s: float) -> None:
        """A span too short to be trusted tells something as long as there is nothing better."""
        if busy_s < _SHORT_SPAN_S or self._busy_bytes < _SHORT_SPAN_BYTES:
            return
        self._short_samples.append(self._busy_bytes / busy_s)
        if not self._samples or now_s - self._samples[-1][0] > _SAMPLE_AGE_S:
            self._samples.clear()
            self._rate = median(self._short_samples)

    def _add_sample(self, rate: float, now_s: float, *, is_driven: bool) -> None:
        samples = self._samples
        while samples and now_s - samples[0][0] > _SAMPLE_AGE_S:
            samples.popleft()
        if samples and self._are_driven and not is_driven:
            return  # what was needed is not what the link carries
        if is_driven and not self._are_driven:
            samples.clear()
        self._are_driven = is_driven
        samples.append((now_s, rate))
        ordered = sorted(sample for _, sample in samples)
        self._rate = ordered[round(_QUANTILE * (len(ordered) - 1))]
