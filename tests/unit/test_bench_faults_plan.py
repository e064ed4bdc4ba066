"""The plan of faults, what clients ask, and when the system counts as whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.fault_lab.parts import Plan, service_parts
from bench.fault_lab.plan import WITHOUT_GATEWAYS, Fault, FaultKind, plan_faults, stage_place
from bench.fault_lab.prompts import make_prompts
from bench.faults import parse


def test_a_seed_gives_the_same_faults_again_and_another_seed_others() -> None:
    assert plan_faults(30, WITHOUT_GATEWAYS, 7) == plan_faults(30, WITHOUT_GATEWAYS, 7)
    assert plan_faults(30, WITHOUT_GATEWAYS, 7) != plan_faults(30, WITHOUT_GATEWAYS, 8)


def test_a_longer_plan_begins_like_a_shorter_one() -> None:
    assert plan_faults(40, WITHOUT_GATEWAYS, 3)[:10] == plan_faults(10, WITHOUT_GATEWAYS, 3)


def test_every_kind_comes_equally_often() -> None:
    rounds = 4
    kinds = Counter(fault.kind for fault in plan_faults(rounds * len(WITHOUT_GATEWAYS), WITHOUT_GATEWAYS, 1))
    assert set(kinds.values()) == {rounds}
    assert FaultKind.KILL_GATEWAY not in kinds


def test_processes_are_stopped_for_three_to_six_seconds_and_links_cut_for_one_to_five() -> None:
    for fault in plan_faults(300, list(FaultKind), 5):
        if fault.kind.startswith("stop-"):
            assert 3 <= fault.lasts_s <= 6
        if fault.kind.endswith("-link"):
            assert 1 <= fault.lasts_s <= 5
        assert 0 <= fault.pick < 1


@pytest.mark.parametrize(
    ("kind", "num_stages", "places"),
    [
        (FaultKind.KILL_HEAD, 3, {0}),
        (FaultKind.STOP_MIDDLE, 3, {1}),
        (FaultKind.KILL_MIDDLE, 5, {1, 2, 3}),
        (FaultKind.KILL_MIDDLE, 2, {1}),
        (FaultKind.STOP_TAIL, 4, {3}),
        (FaultKind.KILL_STANDBY, 3, {None}),
        (FaultKind.KILL_HEAD, 1, {0}),
        (FaultKind.KILL_TAIL, 1, {0}),
    ],
)
def test_which_stage_is_hit(kind: FaultKind, num_stages: int, places: set[int | None]) -> None:
    assert {stage_place(kind, num_stages, pick / 100) for pick in range(100)} == places


def test_nobody_can_be_chosen_from_nobody() -> None:
    fault = Fault(kind=FaultKind.KILL_STANDBY, pick=0.99, lasts_s=1, streams_before_s=1)
    assert fault.choose([]) is None
    assert fault.choose(["a", "b", "c"]) == "c"


def test_gateways_are_killed_only_where_that_is_asked_for() -> None:
    assert FaultKind.KILL_GATEWAY not in parse([]).kinds
    assert FaultKind.KILL_GATEWAY in parse(["--gateways"]).kinds
    assert parse(["--kinds", "kill-gateway,kill-head"]).gateways
    assert parse(["--kinds", "kill-head, stop-tail"]).kinds == [FaultKind.KILL_HEAD, FaultKind.STOP_TAIL]


def test_prompts_differ_and_stay_the_same() -> None:
    prompts = make_prompts(40)
    assert prompts == make_prompts(40)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert {prompt.is_greedy for prompt in prompts} == {True, False}
    assert all(150 <= prompt.max_tokens <= 200 for prompt in prompts)
    assert all(prompt.body("demo")["seed"] == prompt.seed for prompt in prompts)


def test_each_worker_has_a_link_of_its_own(tmp_path: Path) -> None:
    plan = Plan(workers=3, stages=2)
    parts = service_parts(
        plan,
        nats_port=4222,
        redis_port=6379,
        link_ports={"worker-1": 1001, "worker-2": 1002, "worker-3": 1003},
        gateway_ports=[8001, 8002],
        logs=tmp_path,
    )
    urls = {part.name: part.command[part.command.index("--nats-url") + 1] for part in parts}
    assert urls["worker-2"] == "nats://127.0.0.1:1002"
    assert {urls[name] for name in ("scheduler-1", "scheduler-2", "gateway-1")} == {"nats://127.0.0.1:4222"}
    assert len(urls) == 2 + 2 + 3
