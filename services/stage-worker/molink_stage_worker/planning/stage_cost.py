"""What a step costs at one stage: learnt from the times that come back, asked for any step.

    time = speed × (curve(tokens) + per sequence × sequences + per context token × context)

The curve is a list of *anchors*: mean times by token count, a quarter of an octave apart. So it can bend where the
machine bends (a GPU is flat until its arithmetic is the limit, a CPU has stairs), and what was measured once stays
known. `speed` is what all anchors share: when a machine slows down while it runs steps of one size only, the other
sizes are known to have slowed down too. An anchor that is still young takes a surprise for its own; an old one takes
it for a change of speed. Everything is learnt in ratios, because that is how times scatter.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from math import exp, log, log2

from molink_common.messages import StageCostReport
from molink_stage_worker.planning.least_squares import ForgettingLeastSquares

_ANCHORS_AN_OCTAVE = 4
_FIRST_TIMES = 5
"""The median of so many begins a stage's first anchor: the first steps of a process are slow."""
_LEAST_S = 1e-7
_LONGEST_S = 3600.0
_ANCHOR_GAIN = 0.01
_SPEED_GAIN = 0.06
_OLD_ANCHOR = 12.0
"""With half so many observations, an anchor's surprises are half its own and half the stage's speed."""
_LEAST_SCATTER = 0.05
_MOST_SCATTER = 0.35
_CLIP_SCATTERS = 2.5
_YOUNG_CLIP = log(2.0)
_BELIEF = 0.1
"""The weight of what is believed before it is measured; a measured step has 1."""
_KNOWN_AFTER = 3
_LEFT_FLOOR = 0.3
"""Left of all anchors no step is believed to cost less than this share of the smallest one measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCurve:
    """A stage's cost at one moment. Never falls as tokens, sequences or context grow."""

    tokens: tuple[float, ...]
    """Of the anchors, rising."""
    times_s: tuple[float, ...]
    """Of the anchors, without the part for sequences and context; never falling."""
    fixed_s: float
    per_token_s: float
    """Of the straight line that fits best; carries on beyond the anchors."""
    per_sequence_s: float
    per_context_token_s: float

    def compute_s(self, tokens: float, sequences: float, context_tokens: float) -> float:
        """The time of a step."""
        return self._of_tokens_s(tokens) + self.per_sequence_s * sequences + self.per_context_token_s * context_tokens

    def _of_tokens_s(self, tokens: float) -> float:
        right = bisect_left(self.tokens, tokens)
        if right == 0:
            first_s = self.times_s[0]
            return max(first_s - self.per_token_s * (self.tokens[0] - tokens), _LEFT_FLOOR * first_s)
        left = right - 1
        if right == len(self.tokens):
            return self.times_s[left] + self.per_token_s * (tokens - self.tokens[left])
        straight_s = self.times_s[left] + self._slope(left) * (tokens - self.tokens[left])
        # Between anchors far apart a straight line overrates a curve that is flat first and then rises, and what is
        # overrated is never tried, so the error would stay. A curve that bends upwards lies above its neighbours'
        # lines: take those where they are known, and find out.
        if left == 0 or right + 1 == len(self.tokens):
            return straight_s
        from_left_s = self.times_s[left] + self._slope(left - 1) * (tokens - self.tokens[left])
        from_right_s = self.times_s[right] - self._slope(right) * (self.tokens[right] - tokens)
        return max(self.times_s[left], min(straight_s, max(from_left_s, from_right_s)))

    def _slope(self, left: int) -> float:
        return (self.times_s[left + 1] - self.times_s[left]) / (self.tokens[left + 1] - self.tokens[left])


@dataclass(slots=True)
class _Anchor:
    """Means over the steps of about one size; `time_s` at speed 1."""

    time_s: float
    tokens: float
    sequences: float
    context_tokens: float
    count: int = 1


@dataclass(slots=True)
class StageEstimator:
    """Online; one stage. Deterministic, and a single outlier moves nothing by more than a few percent."""

    observations: int = 0
    _speed: float = 1.0
    _scatter: float = 0.2
    _anchors: dict[int, _Anchor] = field(default_factory=dict)
    _first: list[tuple[float, int, int, int]] = field(default_factory=list)
    _line: ForgettingLeastSquares = field(
        default_factory=lambda: ForgettingLeastSquares(
            scales=(1.0, 64.0, 64.0, 8192.0), ridge=(0.0, 0.001, 0.05, 0.05), memory=0.998
        )
    )
    _coefficients: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    _curve: StageCurve | None = None

    def on_step(self, *, tokens: int, sequences: int, context_tokens: int, compute_s: float) -> None:
        """A step of this stage took `compute_s`."""
        if tokens < 1:
            return
        self.observations += 1
        measured_s = min(max(compute_s, _LEAST_S), _LONGEST_S)
        if not self._anchors:
            self._begin(measured_s, tokens, sequences, context_tokens)
            return
        key = round(_ANCHORS_AN_OCTAVE * log2(tokens))
        anchor = self._anchors.get(key)
        if anchor is None:
            curve = self._shape()
            anchor = _Anchor(
                time_s=curve.compute_s(tokens, sequences, context_tokens),
                tokens=tokens,
                sequences=sequences,
                context_tokens=context_tokens,
                count=0,
            )
            self._anchors[key] = anchor
        self._learn(anchor, measured_s, tokens, sequences, context_tokens)
        self._curve = None

    @property
    def scatter(self) -> float:
        """How far times lie from what was expected, as a share of it."""
        return self._scatter

    def knows(self, tokens: int) -> bool:
        """Whether steps of about so many tokens were measured."""
        anchor = self._anchors.get(round(_ANCHORS_AN_OCTAVE * log2(tokens)))
        return anchor is not None and anchor.count >= _KNOWN_AFTER

    def curve(self) -> StageCurve | None:
        """The cost as known now. None: not enough observations."""
        if not self._anchors:
            return None
        if self._curve is None:
            shape = self._shape()
            self._curve = StageCurve(
                tokens=shape.tokens,
                times_s=tuple(self._speed * time_s for time_s in shape.times_s),
                fixed_s=self._speed * shape.fixed_s,
                per_token_s=self._speed * shape.per_token_s,
                per_sequence_s=self._speed * shape.per_sequence_s,
                per_context_token_s=self._speed * shape.per_context_token_s,
            )
        return self._curve

    def report(self) -> StageCostReport | None:
        """The straight line that fits best, for people. None: not enough observations."""
        curve = self.curve()
        if curve is None:
            return None
        return StageCostReport(
            fixed_s=curve.fixed_s,
            per_token_s=curve.per_token_s,
            per_sequence_s=curve.per_sequence_s,
            per_context_token_s=curve.per_context_token_s,
            observations=self.observations,
        )

    # --- how -------------------------------------------------------------------------------------------------

    def _begin(self, measured_s: float, tokens: int, sequences: int, context_tokens: int) -> None:
        """Take the median of the first times, in seconds a token-and-a-bit, so that one slow start is no rule."""
        self._first.append((measured_s, tokens, sequences, context_tokens))
        if len(self._first) < _FIRST_TIMES:
            return
        ordered = sorted(self._first, key=lambda first: (first[0] / first[1], first))
        time_s, tokens, sequences, context_tokens = ordered[_FIRST_TIMES // 2]
        key = round(_ANCHORS_AN_OCTAVE * log2(tokens))
        self._anchors[key] = _Anchor(time_s=time_s, tokens=tokens, sequences=sequences, context_tokens=context_tokens)
        self._fit(time_s, tokens, sequences, context_tokens)
        # until other sizes are seen, half of the time is believed to be fixed and half to grow with the tokens
        for other in (0.5, 2.0):
            believed_s = time_s * (1.0 + other) / 2.0
            weight = _BELIEF / (believed_s * believed_s)
            features = (1.0, other * tokens, other * sequences, float(context_tokens))
            self._line.add(features, believed_s, weight)
        self._first.clear()

    def _learn(self, anchor: _Anchor, measured_s: float, tokens: int, sequences: int, context_tokens: int) -> None:
        _, per_token_s, per_sequence_s, per_context_s = self._coefficients
        expected_s = (
            anchor.time_s
            + per_token_s * (tokens - anchor.tokens)
            + per_sequence_s * (sequences - anchor.sequences)
            + per_context_s * (context_tokens - anchor.context_tokens)
        )
        expected_s = max(expected_s, _LEFT_FLOOR * anchor.time_s, _LEAST_S)
        surprise = log(measured_s / (self._speed * expected_s))
        age = anchor.count / (anchor.count + _OLD_ANCHOR)
        clip = max(_CLIP_SCATTERS * self._scatter, (1.0 - age) * _YOUNG_CLIP)
        # what stands for a size that was never run is drawn from far away: a step that was quicker is right
        surprise = min(surprise if anchor.count == 0 else max(surprise, -clip), clip)
        clipped_s = expected_s * exp(surprise)
        self._fit(clipped_s, tokens, sequences, context_tokens)
        anchor.count += 1
        gain = max(1.0 / anchor.count, _ANCHOR_GAIN)
        anchor.time_s = max(anchor.time_s + gain * (clipped_s - anchor.time_s), _LEAST_S)
        anchor.tokens += gain * (tokens - anchor.tokens)
        anchor.sequences += gain * (sequences - anchor.sequences)
        anchor.context_tokens += gain * (context_tokens - anchor.context_tokens)
        # as the anchor above, after the mean of times: after that of their logarithms it would sink for ever
        change = _SPEED_GAIN * age * (exp(surprise) - 1.0)
        self._speed = min(max(self._speed * exp(change), 1e-9), 1e9)
        scatter = self._scatter + 0.03 * age * (1.25 * abs(surprise) - self._scatter)
        self._scatter = min(max(scatter, _LEAST_SCATTER), _MOST_SCATTER)

    def _fit(self, time_s: float, tokens: int, sequences: int, context_tokens: int) -> None:
        weight = 1.0 / (time_s * time_s)
        self._line.add((1.0, float(tokens), float(sequences), float(context_tokens)), time_s, weight)

    def _shape(self) -> StageCurve:
        """The curve at speed 1."""
        self._coefficients = self._line.solve()
        fixed_s, per_token_s, per_sequence_s, per_context_s = self._coefficients
        anchors = sorted(self._anchors.values(), key=lambda anchor: anchor.tokens)
        times_s = [
            max(
                anchor.time_s - per_sequence_s * anchor.sequences - per_context_s * anchor.context_tokens,
                0.1 * anchor.time_s,
            )
            for anchor in anchors
        ]
        weights = [float(min(anchor.count, 50)) + 0.1 for anchor in anchors]
        return StageCurve(
            tokens=tuple(anchor.tokens for anchor in anchors),
            times_s=tuple(never_falling(times_s, weights)),
            fixed_s=fixed_s,
            per_token_s=per_token_s,
            per_sequence_s=per_sequence_s,
            per_context_token_s=per_context_s,
        )


def never_falling(values: list[float], weights: list[float]) -> list[float]:
    """The nearest list that never falls (isotonic regression by pooling adjacent violators, Barlow et al. 1972)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            together = before[1] + pool[1]
            mean = (before[0] * before[1] + pool[0] * pool[1]) / together
            pool = (mean, together, before[2] + pool[2])
        pools.append(pool)
    return [value for value, _, length in pools for _ in range(length)]
