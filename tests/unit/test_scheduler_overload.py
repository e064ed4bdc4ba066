"""When newcomers are turned away: predictions, with a clock that is an argument."""

from __future__ import annotations

import random
from collections import Counter, deque
from itertools import pairwise

import pytest

from molink_common.messages import Admitted, RefusalCode, Refused, StartSequence, SubmitSequence
from molink_common.sampling import SamplingOptions
from molink_scheduler.events import EpochTaken, SequenceSaved, SequenceSubmitted, StartAnswered, TokensArrived
from molink_scheduler.instructions import Instruction, ReplyTo, StartSequenceAt
from molink_scheduler.overload import (
    LEAST_LINE,
    RESUME_AT,
    Line,
    LineMeter,
    Overload,
    Speed,
    predicted_ttft_s,
)
from tests.scheduler_builders import Driver, beats_of, make_heartbeat, make_settings, make_step, refusal


def line(awaits_places: bool = True, **counts: int) -> Line:
    return Line(
        sequences=counts,
        prompt_tokens={tenant: 100 * count for tenant, count in counts.items()},
        awaits_places=awaits_places,
    )


def measured(*, each_s: float, prompt_tokens: int = 100, count: int = 40, length: int = 10) -> LineMeter:
    meter = LineMeter()
    for number in range(count + 1):
        meter.look(length, number * each_s)
        if number:
            meter.first_token(prompt_tokens)
    return meter


def test_the_line_moves_as_fast_as_first_tokens_come() -> None:
    speed = measured(each_s=0.5).speed()
    assert speed is not None
    assert speed == pytest.approx((2.0, 200.0))


def test_time_without_a_line_says_nothing_of_its_speed() -> None:
    meter = measured(each_s=0.5)
    meter.look(0, 20.5)
    meter.look(10, 1000.0)
    speed = meter.speed()
    assert speed is not None and speed.sequences_per_s == pytest.approx(2.0, rel=0.05)


def test_a_short_line_says_nothing_of_how_fast_a_long_one_would_move() -> None:
    assert measured(each_s=1.0, length=LEAST_LINE - 1).speed() is None


def test_a_line_that_stands_still_gets_slower_in_the_books() -> None:
    meter = measured(each_s=0.1)
    before = meter.speed()
    meter.look(10, 4.0 + 20.0)
    after = meter.speed()
    assert before is not None and after is not None
    assert after.sequences_per_s < before.sequences_per_s / 4


def test_a_change_of_speed_is_learnt_within_half_a_minute() -> None:
    meter = measured(each_s=0.1, count=300)
    now_s = 30.0
    for _ in range(36):
        now_s += 1.0
        meter.look(10, now_s)
        meter.first_token(100)
    speed = meter.speed()
    assert speed is not None and speed.sequences_per_s == pytest.approx(1.0, rel=0.1)


def test_one_waits_for_all_who_stand_before_it() -> None:
    speed = Speed(sequences_per_s=2.0, prompt_tokens_per_s=1000.0)
    assert predicted_ttft_s(line(a=9), speed, tenant="a", prompt_tokens=1) == 5.0


def test_another_tenant_waits_for_as_many_of_the_flood_as_it_has_itself() -> None:
    speed = Speed(sequences_per_s=2.0, prompt_tokens_per_s=1000.0)
    assert predicted_ttft_s(line(flood=100), speed, tenant="polite", prompt_tokens=1) == 1.0
    assert predicted_ttft_s(line(flood=100, polite=2), speed, tenant="polite", prompt_tokens=1) == 3.0


def test_where_places_are_plenty_what_counts_is_the_prompts_length() -> None:
    speed = Speed(sequences_per_s=2.0, prompt_tokens_per_s=100.0)
    few = line(awaits_places=False, a=3)
    assert predicted_ttft_s(few, speed, tenant="a", prompt_tokens=700) == 10.0


def test_nobody_is_turned_away_before_anything_was_measured() -> None:
    overload = Overload(1.0)
    assert overload.why_not(line(a=1000), tenant="a", prompt_tokens=10) is None


def test_nobody_is_turned_away_from_a_short_line_or_without_a_target() -> None:
    slow = measured(each_s=100.0)
    overload = Overload(1.0)
    overload.meters[True] = slow
    assert overload.why_not(line(a=LEAST_LINE - 1), tenant="a", prompt_tokens=10) is None
    assert overload.why_not(line(a=500), tenant="b", prompt_tokens=10) is None
    assert overload.why_not(line(a=500), tenant="a", prompt_tokens=10) is not None
    off = Overload(0.0)
    off.meters[True] = slow
    assert off.why_not(line(a=500), tenant="a", prompt_tokens=10) is None


def test_who_was_turned_away_comes_in_once_the_line_is_a_little_shorter() -> None:
    overload = Overload(10.0)
    overload.meters[True] = measured(each_s=0.5)
    assert overload.why_not(line(a=19), tenant="a", prompt_tokens=1) is None
    late = overload.why_not(line(a=20), tenant="a", prompt_tokens=1)
    assert late is not None and late.predicted_s == 10.5
    assert late.retry_after_s == pytest.approx(10.5 - 10 * RESUME_AT)
    assert late.holds_s is not None and late.holds_s > 0
    assert overload.why_not(line(a=19), tenant="a", prompt_tokens=1) is not None
    assert overload.why_not(line(a=17), tenant="a", prompt_tokens=1) is None
    assert overload.why_not(line(a=19), tenant="a", prompt_tokens=1) is None


def test_a_refusal_because_of_a_long_prompt_does_not_hold_for_short_ones() -> None:
    overload = Overload(10.0)
    overload.meters[True] = measured(each_s=0.5)
    late = overload.why_not(line(awaits_places=False, a=4), tenant="a", prompt_tokens=50_000)
    assert late is not None and late.holds_s is None
    assert overload.why_not(line(awaits_places=False, a=4), tenant="a", prompt_tokens=10) is None


def test_how_fast_an_empty_pool_fills_says_nothing_of_how_fast_places_become_free() -> None:
    overload = Overload(10.0)
    for number in range(40):
        overload.look(20, number * 0.1, awaits_places=False)
        overload.first_token(100)
    assert overload.why_not(line(a=30), tenant="a", prompt_tokens=1) is None, "nothing better is known yet"
    for number in range(10):
        overload.look(20, 4.0 + number, awaits_places=True)
        overload.first_token(100)
    late = overload.why_not(line(a=30), tenant="a", prompt_tokens=1)
    assert late is not None and late.predicted_s == pytest.approx(31.0, rel=0.15)


class Client:
    """Submits, and is the head: one first token every `each_s`, in the order of arrival."""

    def __init__(self, target_s: float, *, each_s: float, **settings: object) -> None:
        self.driver = Driver(make_settings(ttft_target_s=target_s, **settings))
        self.driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
        self.driver.do(EpochTaken(1))
        self.driver.beat(*beats_of(1, "w1", "w2"))
        self.each_s = each_s
        self.queue: deque[tuple[str, float]] = deque()
        self.free_at_s = self.driver.now_s
        self.ttft_s: list[float] = []
        self.refused: list[Refused] = []
        self.numbers = 0

    def advance(self, until_s: float) -> None:
        while self.queue:
            sequence, came_s = self.queue[0]
            at_s = max(self.free_at_s, came_s) + self.each_s
            if at_s > until_s:
                break
            self.queue.popleft()
            self.free_at_s = at_s
            self.driver.now_s = at_s
            self.ttft_s.append(at_s - came_s)
            self.driver.do(TokensArrived(make_step(1, (sequence, 0, 5, None))))
        self.driver.now_s = until_s

    def submit(self, at_s: float, tenant: str = "") -> list[Instruction]:
        self.advance(at_s)
        self.numbers += 1
        request = SubmitSequence(
            sequence=f"{self.numbers:016x}",
            gateway="g1",
            request="r",
            model="demo",
            prompt=(1,) * 10,
            options=SamplingOptions(max_tokens=10),
            tenant=tenant,
        )
        done = self.driver.do(SequenceSubmitted(request, self.numbers))
        if any(isinstance(one, ReplyTo) for one in done):
            self.refused.append(refusal(done))
            return done
        done = self.driver.do(SequenceSaved(request.sequence))
        self.driver.do(StartAnswered(request.sequence, 1))
        self.queue.append((request.sequence, at_s))
        return done


@pytest.mark.parametrize("load", [0.7, 0.9])
def test_below_capacity_nobody_is_refused(load: float) -> None:
    client, dice = Client(5.0, each_s=0.1, max_sequences=4096), random.Random(1)
    at_s = client.driver.now_s
    for _ in range(1500):
        at_s += dice.expovariate(load / 0.1)
        client.submit(at_s)
    assert client.refused == []


@pytest.mark.parametrize("load", [1.5, 2.0, 10.0])
def test_beyond_capacity_the_admitted_stay_within_the_target_and_the_line_never_runs_dry(load: float) -> None:
    client, dice = Client(5.0, each_s=0.1, max_sequences=4096), random.Random(2)
    began_s = at_s = client.driver.now_s
    while at_s < began_s + 120:
        at_s += dice.expovariate(load / 0.1)
        client.submit(at_s)
    assert {one.code for one in client.refused} == {RefusalCode.OVERLOADED}
    settled = sorted(client.ttft_s[100:])
    assert settled[int(0.99 * len(settled))] <= 5.0 * 1.1
    assert len(client.ttft_s) >= 0.97 * 120 / client.each_s, "capacity is lost to refusals"
    share = len(client.refused) / client.numbers
    assert share == pytest.approx(1 - 1 / load, abs=0.1)


def test_the_answer_does_not_change_with_every_request() -> None:
    client, dice = Client(5.0, each_s=0.1, max_sequences=4096), random.Random(3)
    at_s = client.driver.now_s
    answers = []
    for _ in range(2000):
        at_s += dice.expovariate(2.0 / 0.1)
        before = len(client.refused)
        client.submit(at_s)
        answers.append(len(client.refused) == before)
    changes = sum(a != b for a, b in pairwise(answers[200:]))
    assert changes < 0.2 * len(answers)


def test_another_tenant_is_let_in_while_a_flood_is_refused() -> None:
    client = Client(2.0, each_s=0.1, max_sequences=4096)
    at_s = client.driver.now_s
    for _ in range(400):
        at_s += 0.02
        client.submit(at_s, tenant="flood")
    refused = len(client.refused)
    assert refused > 100
    done = client.submit(at_s, tenant="polite")
    assert len(client.refused) == refused
    starts = [one for one in done if isinstance(one, StartSequenceAt)]
    assert [type(one.start) for one in starts] == [StartSequence] and starts[0].start.tenant == "polite"
    client.submit(at_s + 0.001, tenant="flood")
    assert len(client.refused) == refused + 1


def test_the_last_places_are_kept_for_tenants_that_have_less() -> None:
    client = Client(0.0, each_s=1000.0, max_sequences=16)
    at_s = client.driver.now_s
    for _ in range(20):
        client.submit(at_s, tenant="flood")
    assert Counter(one.code for one in client.refused) == {RefusalCode.QUEUE_FULL: 6}
    for _ in range(3):
        client.submit(at_s, tenant="polite")
    assert len(client.refused) == 6 + 1


def test_without_keys_all_places_are_everybodys() -> None:
    client = Client(0.0, each_s=1000.0, max_sequences=16)
    for _ in range(20):
        client.submit(client.driver.now_s)
    assert len(client.refused) == 4


def test_an_admission_is_answered_as_before() -> None:
    client = Client(20.0, each_s=0.1)
    done = client.submit(client.driver.now_s)
    assert [type(one.message) for one in done if isinstance(one, ReplyTo)] == [Admitted]
