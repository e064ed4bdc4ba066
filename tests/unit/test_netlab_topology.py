"""Topologies: what their files say, what is refused, and what a laboratory is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import bench.netlab
from bench.netlab.links import Counters, netem_words, read_counters, shape_words
from bench.netlab.nats_config import nats_config
from bench.netlab.parts import ServingOptions, parts_of
from bench.netlab.plan import LabPlan, Route
from bench.netlab.probe import expected_goodput_bit_per_s
from bench.netlab.topology import (
    Host,
    LinkSpec,
    NatsRole,
    NatsServer,
    Topology,
    TopologyError,
    WorkerPlace,
    three_hosts,
    two_hosts,
)
from bench.netlab.topology_file import parse_topology, read_topology

EXAMPLES = Path(bench.netlab.__file__).parent / "topologies"
WAN = LinkSpec(rate_bit_per_s=100e6, round_trip_s=0.03)
TWO = """
services = "a"
[hosts.a]
nats = "hub"
[hosts.b]
[[links]]
between = ["a", "b"]
{link}
[[workers]]
host = "a"
[[workers]]
host = "b"
{worker}
"""


def two(link: str = "", worker: str = "") -> Topology:
    return parse_topology(TWO.format(link=link, worker=worker))


@pytest.mark.parametrize(
    ("file", "topology"),
    [
        ("two_hosts", two_hosts(WAN)),
        ("two_hosts_leaf", two_hosts(WAN, tail_site_has_leaf=True)),
        ("three_hosts_cluster", three_hosts(WAN)),
    ],
)
def test_the_example_files_are_the_constructors(file: str, topology: Topology) -> None:
    assert read_topology(EXAMPLES / f"{file}.toml") == topology


def test_a_link_without_a_shape_is_a_lan() -> None:
    assert two().link("b", "a") is None


def test_units_of_a_link() -> None:
    link = two("rate_mbit_per_s = 10\nround_trip_ms = 40\nqueue_ms = 50\nloss_percent = 0.5").link("a", "b")
    assert link == LinkSpec(rate_bit_per_s=10e6, round_trip_s=0.04, queue_bytes=62_500, loss=0.005)


def test_flags_and_server_of_a_worker() -> None:
    worker = two(worker='flags = ["--max-running", "8"]').workers[1]
    assert worker == WorkerPlace(host="b", nats="a", flags=("--max-running", "8"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWO.format(link="", worker="") + "[hosts.c]\ncolour = 1", r"hosts.c: unknown colour; known are nats"),
        (TWO.format(link="rate = 5", worker=""), r"links: unknown rate; known are between, rate_mbit_per_s"),
        (TWO.format(link='rate_mbit_per_s = "5"', worker=""), r"rate_mbit_per_s is '5'; it must be a float"),
        (TWO.format(link="round_trip_ms = true", worker=""), r"round_trip_ms is True; it must be a float"),
        (TWO.format(link="queue_ms = 5", worker=""), r"a queue without rate_mbit_per_s"),
        (TWO.format(link="rate_mbit_per_s = 5\nqueue_ms = 5\nqueue_bytes = 5000", worker=""), r"not both"),
        (TWO.format(link="loss_percent = 100", worker=""), r"a loss of 1; it is a share"),
        (TWO.format(link="", worker='nats = "b"'), r"worker 1: no NATS server runs on host 'b'"),
        (TWO.format(link="", worker="[[workers]]\nhost = 'x'"), r"worker 2: there is no host 'x'"),
        (TWO.format(link="", worker="").replace('"hub"', '"leaf of b"'), r"one host must have the NATS hub"),
        (TWO.format(link="", worker="").replace('"hub"', '"cluster"'), r"here are 0 hubs and 1 members"),
        (TWO.format(link="", worker="").replace('"hub"', '"centre"'), r"it must be `hub`, `cluster` or `leaf of NAME`"),
        (TWO.format(link="", worker="").replace('services = "a"', ""), r"services is missing"),
        (TWO.format(link="", worker="").replace('between = ["a", "b"]', 'between = ["a", "a"]'), r"joins two hosts"),
        (TWO.format(link="", worker="") + '[[links]]\nbetween = ["b", "a"]', r"are joined twice"),
        ("services = ", r"this is no TOML"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(text: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        parse_topology(text)


def test_a_leaf_joins_a_server_of_the_centre() -> None:
    leaf = NatsServer(role=NatsRole.LEAF, hub="b")
    hosts = (
        Host(name="a", nats=NatsServer(role=NatsRole.HUB)),
        Host(name="b", nats=NatsServer(role=NatsRole.LEAF, hub="a")),
        Host(name="c", nats=leaf),
    )
    with pytest.raises(TopologyError, match="leaf of b, which has none to join"):
        Topology(hosts=hosts, links={}, services="a", workers=())


@pytest.mark.parametrize("name", ["A", "", "b-c", "elevenchars", "1a"])
def test_host_names_fit_into_device_names(name: str) -> None:
    with pytest.raises(TopologyError, match="host name"):
        Host(name=name)


def test_the_queue_is_a_tenth_of_a_second_or_a_round_trip() -> None:
    assert WAN.queue_limit_bytes == 1_250_000
    assert replace(WAN, round_trip_s=0.3).queue_limit_bytes == 3_750_000
    assert replace(WAN, queue_bytes=5000).queue_limit_bytes == 5000
    assert LinkSpec(rate_bit_per_s=1e5).queue_limit_bytes == 16384
    assert LinkSpec().queue_limit_bytes is None


def test_fast_links_carry_large_packets() -> None:
    assert (WAN.mtu_bytes, LinkSpec(rate_bit_per_s=1e9).mtu_bytes, LinkSpec().mtu_bytes) == (1500, 9000, 9000)
    assert expected_goodput_bit_per_s(WAN) == pytest.approx(100e6 * 1448 / 1500)


def test_a_delay_is_half_a_round_trip() -> None:
    assert shape_words(WAN) == {"rate": 100_000_000, "delay": 15_000, "queue": 1_250_000, "loss": 0}
    # 1.25 MB of queue and 187.5 kB on its way, in packets of 1500 bytes
    assert netem_words(replace(WAN, loss=0.01)) == [
        *("delay", "15000us", "rate", "100000000bit", "loss", "1.000000%", "limit", "959"),
    ]  # fmt: skip


def test_counters_are_read() -> None:
    line = "direction 1 packets 1 bytes 2 full 3 lost 4 cut 5 overflow 6"
    assert read_counters(line) == Counters(packets=1, bytes=2, full=3, lost=4, cut=5, overflow=6)


def test_hosts_of_a_mesh_have_direct_routes_and_those_of_a_chain_go_through_the_middle() -> None:
    mesh = three_hosts(WAN)
    chain = replace(mesh, links={pair: link for pair, link in mesh.links.items() if pair != frozenset("ac")})
    assert LabPlan(number=3, topology=mesh).routes("a") == [Route(to="b", through="b"), Route(to="c", through="c")]
    assert LabPlan(number=3, topology=chain).routes("a") == [Route(to="b", through="b"), Route(to="c", through="b")]
    assert LabPlan(number=3, topology=chain).routes("c") == [Route(to="b", through="b"), Route(to="a", through="b")]


def test_in_a_mesh_of_one_kind_no_place_is_special() -> None:
    mesh = three_hosts(WAN)
    assert mesh.is_mesh_of_one_kind
    assert not replace(mesh, links={**mesh.links, frozenset("ab"): None}).is_mesh_of_one_kind
    assert not replace(mesh, links={frozenset("ab"): WAN, frozenset("bc"): WAN}).is_mesh_of_one_kind
    assert not two_hosts(WAN).is_mesh_of_one_kind, "only one of them has a NATS server"


def test_names_and_addresses_of_two_laboratories_differ() -> None:
    one, other = (LabPlan(number=number, topology=two_hosts(WAN)) for number in (1, 12))
    assert one.namespace("b") == "ml-1-b"
    assert not other.namespace("b").startswith("ml-1-")
    assert not other.outer_device("b").startswith("ml-1h")
    assert (one.management_address("b"), other.management_address("b")) == ("198.18.1.6", "198.18.12.6")
    assert one.link_address("b") == "10.77.0.2"


def address_of(host: str) -> str:
    return f"address-of-{host}"


def test_every_part_stands_where_the_topology_says() -> None:
    parts = {part.name: part for part in parts_of(three_hosts(WAN), ServingOptions(), address_of)}
    assert {name: part.host for name, part in parts.items()} == {
        "nats-a": "a",
        "nats-b": "b",
        "nats-c": "c",
        "redis": "a",
        "scheduler": "a",
        "gateway": "a",
        "w0": "a",
        "w1": "b",
        "w2": "c",
    }
    assert parts["w1"].flags[:2] == ("--nats-url", "nats://address-of-b:4222")
    assert parts["scheduler"].flags[parts["scheduler"].flags.index("--stages") + 1] == "3"


def test_the_tail_reaches_the_hub_over_the_link() -> None:
    parts = {part.name: part for part in parts_of(two_hosts(WAN), ServingOptions(), address_of)}
    assert parts["w1"].flags[:2] == ("--nats-url", "nats://address-of-a:4222")
    assert "nats-b" not in parts


def test_given_flags_come_last_so_that_they_win() -> None:
    options = ServingOptions(worker_flags=("--threads", "2"), scheduler_flags=("--stages", "1"))
    topology = two_hosts(WAN)
    tail = replace(topology.workers[1], flags=("--threads", "3"))
    parts = {
        part.name: part
        for part in parts_of(replace(topology, workers=(topology.workers[0], tail)), options, address_of)
    }
    assert parts["w0"].flags[-2:] == ("--threads", "2")
    assert parts["w1"].flags[-2:] == ("--threads", "3")
    assert parts["scheduler"].flags[-2:] == ("--stages", "1")


def test_sites_are_named_in_the_order_of_the_stages() -> None:
    flags = [part.flags for part in parts_of(three_hosts(WAN), ServingOptions(), address_of) if part.name[0] == "w"]
    sites = [one[one.index("--site") + 1] for one in flags]
    assert sites == sorted(sites) and len(set(sites)) == 3


def test_nats_servers_join_over_the_links() -> None:
    leaf = two_hosts(WAN, tail_site_has_leaf=True)
    hub, far = (json.loads(nats_config(leaf, host, address_of)) for host in "ab")
    assert hub["leafnodes"]["listen"] == "0.0.0.0:7422"
    assert far["leafnodes"]["remotes"][0]["urls"] == ["nats-leaf://address-of-a:7422"]
    member = json.loads(nats_config(three_hosts(WAN), "b", address_of))
    assert member["cluster"]["routes"] == ["nats-route://address-of-a:6222", "nats-route://address-of-c:6222"]
    assert member["cluster"]["advertise"] == "address-of-b:6222"
    assert {server["client_advertise"] for server in (hub, far, member)} == {
        *("address-of-a:4222", "address-of-b:4222"),
    }  # fmt: skip
