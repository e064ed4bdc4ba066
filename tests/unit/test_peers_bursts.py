"""What is read off bursts of streams, whichever engine answered them."""

import pytest

from bench.load import StreamResult
from bench.peers.bursts import figures, line, long_prompt, longest_gap_s, tokens_per_s, under_way_after_s
from bench.peers.side_by_side import ratios


def test_the_longest_gap_is_that_around_the_prompt() -> None:
    times = (0.0, 5.0, 5.1, 5.2, 9.2, 9.3, 20.0)
    assert longest_gap_s(times, 5.15, 9.25) == pytest.approx(4.0)
    # a gap that had begun when the prompt came counts whole; one that began after it was done does not
    assert longest_gap_s(times, 4.0, 5.05) == pytest.approx(5.0)
    assert longest_gap_s(times, 9.25, 9.28) == pytest.approx(0.1)


def test_a_stream_that_had_ended_met_no_prompt() -> None:
    assert longest_gap_s((0.0, 1.0), 1.0, 5.0) is None
    assert longest_gap_s((6.0, 7.0), 1.0, 5.0) is None


def stream(started_s: float, token_times_s: tuple[float, ...]) -> StreamResult:
    return StreamResult(
        status=200, started_s=started_s, token_times_s=token_times_s, text="",
        completion_tokens=len(token_times_s), finish_reason="length",
    )  # fmt: skip


def test_the_rate_counts_from_the_first_request_to_the_last_token() -> None:
    assert tokens_per_s([stream(1.0, (2.0, 3.0)), stream(0.0, (2.0, 5.0))]) == pytest.approx(4 / 5)


def test_long_prompts_have_no_common_beginning() -> None:
    prompts = [long_prompt(1500, number) for number in range(32)]
    assert len({prompt[:3] for prompt in prompts}) == 32
    assert all(len(prompt.split()) == 1501 for prompt in prompts)


def burst(tokens_per_s: float, streams: int = 2, tokens: int = 10) -> list[StreamResult]:
    """Streams that begin at 0 and get their tokens at the same pace, `tokens_per_s` together."""
    every_s = streams / tokens_per_s
    return [stream(0.0, tuple(every_s * (number + 1) for number in range(tokens))) for _ in range(streams)]


def test_figures_are_those_of_the_middle_run() -> None:
    found = figures([burst(10.0), burst(40.0), burst(20.0)])
    assert (found["tokens_per_s_min"], found["tokens_per_s"], found["tokens_per_s_max"]) == (10.0, 20.0, 40.0)
    assert found["ttft_p50_s"] == found["tpot_p50_s"] == pytest.approx(0.1)
    assert "20.0 tokens/s (10.0 to 40.0)" in line({"concurrency": 2, **found})


def test_a_row_tells_of_the_stall_it_has() -> None:
    row = {"concurrency": 2, **figures([burst(10.0)]), "stall": {"longest_gap_s": 4.567, "prompt_tokens": 1533}}
    assert line(row).endswith("longest gap 4.57 s behind 1533 tokens")


def test_a_stream_is_under_way_once_it_has_had_eight_tokens() -> None:
    assert under_way_after_s([burst(20.0)]) == pytest.approx(0.9)


def test_ratios_are_those_of_neighbours() -> None:
    # in the second pair the machine was twice as fast for both: that says nothing about either
    found = ratios([burst(20.0), burst(40.0), burst(22.0)], [burst(10.0), burst(20.0), burst(10.0)])
    assert found == {"ratio": 2.0, "ratio_min": 2.0, "ratio_max": 2.2}
