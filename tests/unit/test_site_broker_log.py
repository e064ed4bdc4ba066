"""What a person is told of a nats-server's log. The lines are the server's own."""

from __future__ import annotations

import re

import pytest

from molink.nats_config import BrokerPlan
from molink.nats_log import Kind, LinkStory, Notice, notice_of

LEAF = BrokerPlan(site="home", server_name="n", hub=("hub:17422",))
MEMBER = BrokerPlan(site="home", server_name="n", cluster="pool", cluster_port=6222, routes=("far:6222",))


def line(level: str, text: str) -> str:
    return f"[8537] 2026/11/22 17:29:48.515000 [{level}] {text}\n"


def test_lines_about_links() -> None:
    assert notice_of(line("INF", "Server is ready"), LEAF) == Notice(Kind.READY)
    created = line("INF", "10.0.0.1:17422 - lid:5 - Leafnode connection created for account: $G ")
    assert notice_of(created, LEAF) == Notice(Kind.UP, "lid:5", "10.0.0.1:17422")
    closed = line("INF", "10.0.0.1:17422 - lid:5 - Leafnode connection closed: Stale Connection - Remote: NCB")
    assert notice_of(closed, LEAF) == Notice(Kind.DOWN, "lid:5", "10.0.0.1:17422", "Stale Connection")
    routed = line("INF", "10.0.0.2:33310 - rid:5 - Router connection closed: Incorrect Port")
    assert notice_of(routed, MEMBER) == Notice(Kind.DOWN, "rid:5", "10.0.0.2:33310", "Incorrect Port")


@pytest.mark.parametrize(
    "text",
    [
        line("INF", "  Version:  2.15.1"),
        line("WRN", "Plaintext passwords detected, use nkeys or bcrypt"),
        line("ERR", "1.2.3.4:5 - rid:5 - Error flushing: writev tcp: broken pipe"),
        "not a line of its log",
        "",
    ],
)
def test_lines_that_nobody_must_know(text: str) -> None:
    assert notice_of(text, LEAF) is None


@pytest.mark.parametrize(
    ("plan", "text", "fix"),
    [
        (
            LEAF,
            'Error trying to connect as leafnode to remote server "hub:17422" (attempt 1): '
            "dial tcp 10.0.0.1:17422: connect: connection refused",
            r"waiting for the hub at hub:17422 \(connection refused\).*--hub.*molink up --leaf-port",
        ),
        (
            MEMBER,
            "Error trying to connect to route (attempt 1): dial tcp 10.0.0.9:6222: i/o timeout",
            r"waiting for the brokers at far:6222 \(i/o timeout\).*--routes",
        ),
        (LEAF, "10.0.0.1:4222 - lid:5 - attempted to connect to wrong port", r"port for clients.*7422: set --hub"),
        (LEAF, "10.0.0.1:17422 - lid:5 - Leafnode Error 'Authorization Violation'", "--nats-user and --nats-password"),
        (LEAF, '10.0.0.1:999 - rid:5 - authentication error - User "pool"', r"^10.0.0.1 came with another user"),
        (
            LEAF,
            '10.0.0.1:17422 - lid:6 - Loop detected for leafnode account="$G". Delaying attempt to reconnect for 30s',
            "one hub only",
        ),
        (
            MEMBER,
            '10.0.0.2:9 - rid:6 - Rejecting connection, cluster name "other" does not match "pool"',
            "same --cluster",
        ),
        (LEAF, "something that is not known here", "^something that is not known here$"),
    ],
)
def test_a_problem_comes_with_its_fix(plan: BrokerPlan, text: str, fix: str) -> None:
    notice = notice_of(line("ERR", text), plan)
    assert notice is not None
    assert notice.kind is Kind.PROBLEM
    assert re.search(fix, notice.text)


def test_a_problem_is_told_once_until_the_link_was_up() -> None:
    story = LinkStory(LEAF)
    assert story.problem("waiting") == "waiting"
    assert story.problem("waiting") is None
    assert story.problem("refused") == "refused"
    assert story.settled("lid:5", "10.0.0.1:17422") == "connected with the hub at 10.0.0.1:17422"
    assert story.closed("lid:5", "Read Error") == (
        "lost the hub at 10.0.0.1:17422 (Read Error); local traffic goes on, connecting again"
    )
    assert story.problem("refused") == "refused"


def test_a_link_that_never_settled_is_not_lost() -> None:
    assert LinkStory(MEMBER).closed("rid:5", "Duplicate Route") is None
