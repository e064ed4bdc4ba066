"""From token times to figures, cells, tables and files."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.cost_curve import CostCurve
from bench.link_grid import wan30
from bench.link_grid.bounding import load_of, pipeline_bound
from bench.link_grid.cells import Cell, EngineKind, Setup, Workload, grid, link_of
from bench.link_grid.figures import WindowFigures, spread, spread_of, window_figures
from bench.link_grid.plots import save_plots
from bench.link_grid.results import Results, pooled
from bench.link_grid.steady_load import LoadShape, SteadyLoad, Target, steady_load
from bench.link_grid.tables import best_count_table, grid_tables
from bench.links import cells_of, parse
from bench.load import RequestFailed, TokenTrace
from molink_common.messages import Speculation
from molink_scheduler.settings import SchedulerSettings


def trace(started_s: float, *times_s: float, prompt_tokens: int = 33, is_complete: bool = True) -> TokenTrace:
    arrivals = [(time_s, 1) for time_s in times_s]
    return TokenTrace(prompt_tokens=prompt_tokens, started_s=started_s, arrivals=arrivals, is_complete=is_complete)


def test_only_what_comes_in_the_window_counts() -> None:
    streams = [
        trace(0.0, 1.0, 2.0, 3.0),  # ended before
        trace(3.0, 9.0, 10.0, 13.0),  # ends within: the whole request's TPOT, its gaps of 1 and 3
        trace(13.5, 14.0, 15.0, 16.0, is_complete=False),  # under way
        trace(19.0, 20.0),  # from the end on is outside
    ]
    found = window_figures(streams, [], 10.0, 20.0)
    assert found.tokens_per_s == pytest.approx(0.5)
    assert (found.requests, found.tpot_p50_s) == (1, 2.0)
    assert (found.gap_max_s, found.gap_p50_s) == (3.0, 1.0)
    assert found.ttft_p50_s == 0.5


def test_tokens_that_come_together_are_no_time_apart() -> None:
    merged = TokenTrace(prompt_tokens=2, started_s=0.0, arrivals=[(1.0, 1), (2.0, 4)], is_complete=True)
    found = window_figures([merged], [], 0.0, 10.0)
    assert (found.tokens_per_s, found.tpot_p50_s) == (0.5, 0.25)
    assert (found.gap_p50_s, found.gap_max_s) == (0.0, 1.0)


def test_newcomers_are_reported_apart() -> None:
    newcomers = [trace(1.0, 4.0, 4.1, prompt_tokens=1500), trace(9.0, prompt_tokens=1500, is_complete=False)]
    found = window_figures([trace(0.0, 1.0, 2.0)], newcomers, 0.0, 10.0)
    assert found.newcomer_ttfts_s == (3.0,)
    assert found.tokens_per_s == 0.2


def test_a_window_in_which_nothing_came_has_no_figures() -> None:
    found = window_figures([TokenTrace(prompt_tokens=1, started_s=0.0)], [], 0.0, 1.0)
    assert (found.tokens_per_s, found.tpot_p50_s, found.gap_max_s) == (0.0, None, None)


def test_spread_leaves_out_what_is_missing() -> None:
    assert str(spread([3.0, None, 1.0, 2.5])) == "2.5 (1.0–3.0)"
    assert spread([None]) is None


def test_links_are_named_for_rate_and_round_trip() -> None:
    assert link_of("lan") is None
    for name, rate, round_trip_s in (("1g2", 1e9, 0.002), ("100m30", 100e6, 0.030), ("10m30", 10e6, 0.030)):
        link = link_of(name)
        assert link is not None
        assert (link.rate_bit_per_s, link.round_trip_s) == (rate, round_trip_s)
    with pytest.raises(ValueError, match="fast"):
        link_of("fast")


def test_the_grid_is_every_cell_of_a_setup_in_a_row() -> None:
    cells = cells_of(parse(["--grid"]))
    assert len(cells) == 2 * 5 * 4 * 2 * 3 * 2
    assert len(set(cells)) == len(cells)
    setups = [cell.setup for cell in cells]
    assert sum(one != other for one, other in pairwise(setups)) == len(set(setups)) - 1


def test_fixed_counts_stop_at_the_number_of_streams() -> None:
    arguments = parse(["--grid", "--best-m", "--counts", "2,16", "--concurrency", "1,8,32", "--links", "lan"])
    counts = {(cell.setup.policy, cell.concurrency) for cell in cells_of(arguments)}
    assert counts == {
        *(("adaptive", streams) for streams in (1, 8, 32)),
        *(("adaptive:2", streams) for streams in (8, 32)),
        ("adaptive:16", 32),
    }
    setup = Setup(engine=EngineKind.REAL, stages=2, link="lan", policy="adaptive:16")
    assert setup.scheduler_flags[:4] == ["--scheduling", "adaptive", "--micro-batches", "16"]


def test_a_codec_is_part_of_a_policy() -> None:
    flags = {
        policy: Setup(engine=EngineKind.REAL, stages=2, link="10m30", policy=policy).scheduler_flags
        for policy in ("adaptive", "adaptive+raw", "adaptive:3+int8", "plain", "plain+lossless")
    }
    codecs = {policy: of[of.index("--link-codec") + 1] for policy, of in flags.items()}
    assert codecs == {
        "adaptive": "auto",
        "adaptive+raw": "raw",
        "adaptive:3+int8": "int8",
        "plain": "auto",
        "plain+lossless": "lossless",
    }
    assert flags["adaptive:3+int8"][3] == "3"


def test_speculation_is_part_of_a_policy_and_off_unless_named() -> None:
    chosen = {}
    for policy in ("adaptive", "plain", "adaptive+lookup", "adaptive:3+int8+lookup"):
        flags = Setup(engine=EngineKind.REAL, stages=2, link="10m30", policy=policy).scheduler_flags
        chosen[policy] = flags[flags.index("--speculation") + 1]
    assert list(chosen.values()) == ["off", "off", "lookup", "lookup"]
    assert SchedulerSettings().policy().speculation is Speculation.OFF
    assert SchedulerSettings(speculation=Speculation.LOOKUP).policy().speculation is Speculation.LOOKUP


def test_what_is_no_grid_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--links", "dsl"], ["--policies", "best"], ["--stages", "4"], ["--seconds", "-1"]):
        with pytest.raises(SystemExit):
            parse(["--grid", *flags])
        assert "error:" in capsys.readouterr().err


STATUS: dict[str, Any] = {
    "card": {"hidden_size": 8192},
    "pipelines": [
        {
            "dtype": "bfloat16",
            "layers": [[0, 40], [40, 80]],
            "head": {
                "costs": [
                    {"fixed_s": 0.02, "per_token_s": 1e-3, "per_sequence_s": -1e-9, "per_context_token_s": 0.0},
                    {"fixed_s": 0.03, "per_token_s": 1e-3, "per_sequence_s": 0.0, "per_context_token_s": 0.0},
                ]
            },
        }
    ],
    "workers": [{"stage": None}, {"stage": {"link": None}}, {"stage": {"link": {"share_left": 1.0}}}],
}


def test_a_bound_knows_the_link_and_the_costs() -> None:
    timed = Setup(engine=EngineKind.SYNTHETIC, stages=2, link="100m30", policy="adaptive")
    bound = pipeline_bound(timed, CostCurve(), STATUS)
    assert bound is not None
    assert (bound.bytes_a_token, bound.return_s, bound.links[0].one_way_s) == (16384, 0.015, 0.015)
    assert bound.links[0].rate_bytes_per_s == pytest.approx(12.5e6 * 1448 / 1500)
    assert bound.stages[0](1.0, 1.0, 0.0) == pytest.approx(0.0185)
    encoded = [*STATUS["workers"], {"stage": {"link": {"share_left": 0.75}}}]
    bound = pipeline_bound(timed, CostCurve(), {**STATUS, "workers": encoded})
    assert bound is not None and bound.bytes_a_token == 0.75 * 16384
    real = Setup(engine=EngineKind.REAL, stages=2, link="lan", policy="adaptive")
    bound = pipeline_bound(real, CostCurve(), STATUS)
    assert bound is not None
    assert [stage(10.0, 10.0, 100.0) for stage in bound.stages] == pytest.approx([0.03, 0.04])
    assert (
        pipeline_bound(real, CostCurve(), {**STATUS, "pipelines": [{**STATUS["pipelines"][0], "head": None}]}) is None
    )


def test_only_prompts_that_were_answered_were_carried_for_certain() -> None:
    load = SteadyLoad(shape=LoadShape(streams=8), began_s=100.0)
    load.newcomers = [
        trace(101.0, 104.0, prompt_tokens=1500),
        trace(106.0, 111.0, prompt_tokens=1500),
        trace(107.0, prompt_tokens=1500, is_complete=False),
    ]
    found = load_of(load, 110.0)
    assert (found.sequences, found.context_tokens, found.prompt_share) == (8, 64.0, 31 / 64)
    assert found.prompt_tokens_per_s == 150.0


def result_of(cell: Cell, *rates: float, tpot_s: float = 0.05) -> dict[str, Any]:
    runs = [
        WindowFigures(
            tokens_per_s=rate, requests=3, tpot_p50_s=tpot_s, tpot_p99_s=2 * tpot_s, gap_p50_s=tpot_s, gap_p99_s=0.2,
            gap_max_s=0.3, ttft_p50_s=None, newcomer_ttfts_s=(),
        )
        for rate in rates
    ]  # fmt: skip
    bound = {"tokens_per_s": 400.0, "micro_batches": 4, "limit": "link"}
    share = sorted(rates)[len(rates) // 2] / 400.0
    whole = asdict(runs[0])
    return cell.key | {
        "runs": [asdict(run) for run in runs], "whole": whole, "bound": bound, "share_of_bound": share, "plan": None,
    }  # fmt: skip


def test_the_case_sums_up_in_ratios_of_medians() -> None:
    results = [
        result_of(wan30.REAL_LAN, 200.0),
        result_of(wan30.REAL_WAN, 100.0, 180.0, 380.0),
        result_of(wan30.DECODE, 300.0),
        result_of(wan30.MIXED, 240.0, tpot_s=0.055),
        result_of(wan30.MIXED_PLAIN, 40.0),
    ]
    found = wan30.summary(results)
    assert (found["bound_ratio"], found["lan_ratio"], found["plain_ratio"]) == (0.45, 0.9, 6.0)
    assert (found["tpot_p50_ratio"], found["tpot_p99_ratio"]) == (1.1, 1.1)
    assert found["published_ratio"] is None
    assert wan30.summary([wan30.REAL_WAN.key | {"error": "it broke"}])["lan_ratio"] is None


def test_tables_and_plots_show_every_cell_also_those_that_failed(tmp_path: Path) -> None:
    cells = list(
        grid(
            engines=[EngineKind.SYNTHETIC], stages=[2], links=["lan", "100m30"], workloads=[Workload.DECODE],
            policies=["adaptive", "adaptive:2", "adaptive:4"], concurrency=[1, 8],
        )
    )  # fmt: skip
    results = [result_of(cell, 10.0 * cell.concurrency, 12.0 * cell.concurrency) for cell in cells[:-1]]
    results.append(cells[-1].key | {"error": "it broke\nin two lines"})
    table = grid_tables(results)
    assert table.count("\n| ") == len(cells) + 2
    assert "88.0 (80.0–96.0)" in table
    assert "failed: it broke" in table
    # of the header's two lines one is counted; a single stream has no fixed count to compare with
    assert best_count_table(results).count("\n| ") == 1 + 2
    (plot,) = save_plots(results, tmp_path)
    assert plot.stat().st_size > 1000


def test_turns_take_the_policies_one_after_the_other_and_are_shown_as_one() -> None:
    cells = list(
        grid(
            engines=[EngineKind.REAL], stages=[2], links=["lan"], workloads=[Workload.DECODE],
            policies=["adaptive", "published"], concurrency=[8, 32], turns=3,
        )
    )  # fmt: skip
    assert [(cell.turn, cell.setup.policy) for cell in cells[::2]] == [
        (turn, policy) for turn in (1, 2, 3) for policy in ("adaptive", "published")
    ]
    results = [result_of(cell, 10.0 * cell.turn * cell.concurrency) for cell in cells]
    results[0] = cells[0].key | {"error": "it broke"}
    shown = pooled(results)
    assert [(one["policy"], one["concurrency"]) for one in shown] == [
        ("adaptive", 8), ("adaptive", 32), ("published", 8), ("published", 32),
    ]  # fmt: skip
    assert spread_of(shown[0], "tokens_per_s") == spread([160.0, 240.0])
    assert spread_of(shown[1], "tokens_per_s") == spread([320.0, 640.0, 960.0])
    assert shown[1]["whole"]["tokens_per_s"] == 640.0
    assert pooled([results[0]]) == [results[0]]


def test_an_interrupted_grid_goes_on_with_what_failed_or_is_left(tmp_path: Path) -> None:
    first, second = wan30.MIXED, wan30.MIXED_PLAIN
    file = tmp_path / "out" / "links.json"
    results = Results(file, {"runs": 3}, resume=False)
    results.add(result_of(first, 5.0))
    results.add(second.key | {"error": "it broke"})
    again = Results(file, {"runs": 3}, resume=True)
    assert again.has(first)
    assert not again.has(second)
    found = again.find(first)
    assert found is not None
    assert spread_of(found, "tokens_per_s") == spread([5.0])
    with pytest.raises(ValueError, match="measured otherwise"):
        Results(file, {"runs": 4}, resume=True)
    assert not Results(file, {"runs": 4}, resume=False).has(first)


async def test_a_closed_loop_keeps_its_streams_up_and_names_the_first_failure() -> None:
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"}"))
        if len(asked) <= 12:
            body = b'data: {"choices":[{"token_ids":[5]}]}\n\n' * int(
                asked[-1].partition(b'"max_tokens":')[2].split(b",")[0]
            )
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body + b"data: [DONE]\n\n")
        else:
            writer.write(b'HTTP/1.1 503 No\r\n\r\n{"error":{"message":"no pipeline"}}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    target = Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1], model="m")
    async with server:
        with pytest.raises(RequestFailed, match="no pipeline"):
            async with asyncio.timeout(10), steady_load(target, LoadShape(streams=4)) as load:
                await load.until_warm(0.0, 5.0)
                await asyncio.Event().wait()
    # the first requests of the streams end apart
    assert sorted(one.num_tokens for one in load.streams[:4]) == [17, 33, 49, 64]
    assert {one.num_tokens for one in load.streams[4:] if one.is_complete} == {64}
