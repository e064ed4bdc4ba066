"""When the count of micro-batches changes, and when another is tried."""

from __future__ import annotations

from dataclasses import dataclass, field

from molink_stage_worker.planning.choice import MicroBatchChoice
from molink_stage_worker.planning.cycle import Cycle
from molink_stage_worker.planning.cycle_meter import CycleMeter

DECODING = 8


@dataclass
class World:
    """Predictions by count of micro-batches, and cycles that are measured a second after their count began to run."""

    cycles_s: dict[int, float]
    measures: bool = True
    may_try: bool = True
    choice: MicroBatchChoice = field(default_factory=lambda: MicroBatchChoice(2))
    now_s: float = 0.0
    history: list[tuple[float, int]] = field(default_factory=list)
    measured_s: dict[int, float] = field(default_factory=dict)

    def run(self, for_s: float) -> World:
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            count = self.choice.choose(
                decoding=DECODING,
                now_s=self.now_s,
                predict=self.predict,
                measured_at_s=self.measured_s.get,
                may_try=self.may_try,
            ).micro_batches
            if not self.history or self.history[-1][1] != count:
                self.history.append((self.now_s, count))
            if self.measures and self.now_s - self.history[-1][0] >= 1.0:
                self.measured_s[count] = self.now_s
            self.now_s += 0.25
        return self

    def predict(self, count: int) -> Cycle:
        return Cycle(
            micro_batches=count,
            size=-(-DECODING // count),
            stages_s=(0.01,),
            stage_s=0.01,
            link_s=0.0,
            ring_s=0.01,
            cycle_s=self.cycles_s.get(count, 1.0),
        )

    @property
    def counts(self) -> list[int]:
        return [count for _, count in self.history]


def test_what_might_pay_is_tried_once_a_minute_and_left_when_it_was_measured() -> None:
    world = World({1: 0.12, 2: 0.1, 3: 0.11}).run(50.0)
    assert world.counts == [2, 3, 2, 1, 2]
    tries_s = [
        end_s - start_s for (start_s, _), (end_s, _) in zip(world.history[1::2], world.history[2::2], strict=True)
    ]
    assert all(1.0 <= try_s <= 1.5 for try_s in tries_s), tries_s
    assert world.run(30.0).counts == [2, 3, 2, 1, 2, 3, 2, 1, 2]


def test_what_is_predicted_to_be_far_off_is_not_tried() -> None:
    assert World({1: 0.14, 2: 0.1, 3: 0.14, 4: 0.11}).run(50.0).counts == [2]
    assert World({1: 0.14, 2: 0.1, 3: 0.14, 4: 0.104}).run(50.0).counts == [2, 4, 2]


def test_a_try_ends_though_nothing_is_measured() -> None:
    world = World({1: 0.2, 2: 0.1, 3: 0.11}, measured_s={2: 100.0}, measures=False).run(10.0)
    assert world.counts[:3] == [2, 3, 2]
    assert 3.0 <= world.history[2][0] - world.history[1][0] <= 3.5


def test_an_expensive_try_is_followed_by_a_long_rest() -> None:
    world = World({1: 0.2, 2: 0.1, 3: 0.125, 4: 0.104}, measured_s={4: 0.0}).run(6.0)
    assert world.counts == [2, 3, 2]
    world.measured_s.pop(4)
    ended_s = world.history[-1][0]
    assert world.run(14.0).counts == [2, 3, 2, 4, 2]
    assert 8.0 < world.history[3][0] - ended_s < 12.0


def test_a_try_that_shows_a_shorter_cycle_is_followed_by_a_change() -> None:
    world = World({1: 0.12, 2: 0.1}).run(2.5)
    assert world.counts == [2, 1]
    world.cycles_s[1] = 0.09
    world.run(40.0)
    assert world.counts == [2, 1]


def test_nothing_is_tried_while_prompts_would_be_measured_too() -> None:
    world = World({1: 0.12, 2: 0.1, 3: 0.11}, may_try=False).run(20.0)
    assert world.counts == [2]
    world.may_try = True
    assert world.run(5.0).counts == [2, 3, 2]


def test_a_try_is_long_enough_for_cycles_to_be_measured_on_a_slow_pipeline() -> None:
    """Two cycles to settle, one until the first step is back, ten to measure, and a plan only every quarter second."""
    cycle_s = 0.8
    meter = CycleMeter()
    world = World({1: 1.2 * cycle_s, 2: cycle_s, 3: 1.1 * cycle_s}, measures=False)
    while world.now_s < 60.0:
        count = world.choice.choose(
            decoding=DECODING, now_s=world.now_s, predict=world.predict, measured_at_s=meter.measured_at_s
        ).micro_batches
        meter.on_plan(count, DECODING, world.now_s, lambda count, _: world.predict(count).cycle_s)
        meter.on_tokens(2, world.now_s)
        world.now_s += 0.25
    assert meter.measured_at_s(3) is not None
