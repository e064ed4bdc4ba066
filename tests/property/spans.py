"""Mixtures of sequences as a stage sees them in one step."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from molink_stage_worker.engine.block_tables import Span

BLOCK_SIZE = 4


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Of each sequence: tokens from before, tokens of this step."""
    counts = st.one_of(st.just(1), st.integers(1, 40))
    return draw(st.lists(st.tuples(st.integers(0, 150), counts), min_size=1, max_size=7))


def placed(sizes: list[tuple[int, int]], seed: int) -> tuple[list[Span], int]:
    num_blocks = sum(-(-(start + count) // BLOCK_SIZE) for start, count in sizes)
    order = np.random.default_rng(seed).permutation(num_blocks) if seed % 3 else np.arange(num_blocks)
    spans: list[Span] = []
    row = used = 0
    for start, count in sizes:
        taken = -(-(start + count) // BLOCK_SIZE)
        spans.append(Span(row, start, count, order[used : used + taken].astype(np.int64)))
        row, used = row + count, used + taken
    return spans, num_blocks
