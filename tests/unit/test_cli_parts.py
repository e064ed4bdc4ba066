from __future__ import annotations

from pathlib import Path

from molink.parts import Kind, Part, RestartPolicy, exit_reason, in_stop_order, last_words, restart_pause_s


def part(name: str, kind: Kind) -> Part:
    return Part(name=name, kind=kind, command=("true",), log=Path("x"))


def test_parts_stop_from_the_clients_side_inwards() -> None:
    parts = [
        part("nats", Kind.NATS),
        part("redis", Kind.REDIS),
        part("scheduler", Kind.SCHEDULER),
        part("gateway", Kind.GATEWAY),
        part("worker 1", Kind.WORKER),
        part("worker 2", Kind.WORKER),
    ]
    names = [[one.name for one in group] for group in in_stop_order(parts)]
    assert names == [["gateway"], ["worker 1", "worker 2"], ["scheduler"], ["redis"], ["nats"]]


def test_pauses_grow_and_end() -> None:
    policy = RestartPolicy(most=3, within_s=10, first_pause_s=1, longest_pause_s=3)
    ends = [100.0, 101.0, 102.0, 103.0]
    pauses = [restart_pause_s(policy, ends[:count], now_s=ends[count - 1]) for count in range(1, 5)]
    assert pauses == [1, 2, 3, None]


def test_old_ends_are_forgiven() -> None:
    policy = RestartPolicy(most=1, within_s=10, first_pause_s=1)
    assert restart_pause_s(policy, [1.0, 2.0, 3.0, 100.0], now_s=100.0) == 1


def test_the_last_problem_explains_an_end_better_than_the_last_line() -> None:
    log = "\n".join(
        [
            '{"level":"info","event":"starting"}',
            '{"level":"error","event":"service stopped","problem":"no NATS server answers at nats://x"}',
            '{"level":"info","event":"bye"}',
        ]
    )
    assert last_words(log) == "service stopped: no NATS server answers at nats://x"


def test_a_traceback_is_reduced_to_its_last_line() -> None:
    assert last_words("Traceback (most recent call last):\n  File x\nKeyError: 'a'\n") == "KeyError: 'a'"
    line = '{"level":"error","event":"handler failed","traceback":"Traceback\\n  File\\nKeyError: 1"}'
    assert last_words(line) == "handler failed: KeyError: 1"


def test_logs_without_a_problem_and_without_anything() -> None:
    assert last_words("one\ntwo\n") == "two"
    assert last_words("\n") == "it wrote nothing"
    assert last_words('{"level":"info"\n{broken') == "{broken"


def test_exit_reasons() -> None:
    assert exit_reason(2) == "ended with exit code 2"
    assert exit_reason(-9) == "was killed by signal 9"
