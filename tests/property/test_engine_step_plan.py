"""Whatever the mixture of sequences: each token is placed once, and each sees its own past and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molink_stage_worker.engine.attention import PagedStep, paged_attention
from molink_stage_worker.engine.block_tables import Placement, Span
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.step_plan import StepPlan, group_by_length
from tests.property.spans import BLOCK_SIZE, histories, placed

KEY_HEADS, QUERY_HEADS, HEAD_SIZE, VALUE_SIZE = 2, 6, 8, 5


class Layer(torch.nn.Module):
    layer_idx = 0


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one sequence, written down plainly: query ``[H, C, D]`` over all its keys ``[K, S, D]``."""
    group = QUERY_HEADS // KEY_HEADS
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(start, start + query.shape[1])[:, None]
    keys = torch.arange(key.shape[1])[None]
    seen = keys <= positions
    if window is not None:
        seen = seen & (keys > positions - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, query.shape[1], 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[1]] @ value).transpose(0, 1)


@settings(max_examples=120, deadline=None)
@given(
    sizes=histories(),
    seed=st.integers(0, 1000),
    window=st.sampled_from([None, 1, 5, 30]),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
)
def test_every_token_attends_to_its_own_past(
    sizes: list[tuple[int, int]], seed: int, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    spans, num_blocks = placed(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    store = KvStore(num_blocks, BLOCK_SIZE)
    sinks = torch.randn(QUERY_HEADS, generator=generator) if has_sinks else None
    device = torch.device("cpu")

    def step(step_spans: list[Span], states: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        new_blocks = tuple(block for span in step_spans if span.start == 0 for block in span.blocks.tolist())
        placement = Placement(tuple(step_spans), new_blocks)
        plan = StepPlan(placement, block_size=BLOCK_SIZE, device=device, dtype=torch.float32)
        query, key, value = (torch.cat(parts, 1)[None] for parts in zip(*states, strict=True))
        output, _ = paged_attention(
            Layer(),
            query,
            key,
            value,
            None,
            paged=PagedStep(store, plan),
            scaling=0.3,
            softcap=softcap,
            s_aux=sinks,
            sliding_window=window,
        )
        return output[0]

    whole = [
        (
            torch.randn(QUERY_HEADS, span.end, HEAD_SIZE, generator=generator),
            torch.randn(KEY_HEADS, span.end, HEAD_SIZE, generator=generator),
            torch.randn(KEY_HEADS, span.end, VALUE_SIZE, generator=generator),
        )
        for span in spans
    ]
    for span, states in zip(spans, whole, strict=True):
        if span.start:
            past = Span(0, 0, span.start, span.blocks)
            step([past], [tuple(state[:, : span.start] for state in states)])
    now = [tuple(state[:, span.start :] for state in states) for span, states in zip(spans, whole, strict=True)]
    output_THE = step(spans, now)
    for span, (query, key, value) in zip(spans, whole, strict=True):
        wanted = expected(query[:, span.start :], key, value, span.start, window, softcap, sinks)
        torch.testing.assert_close(output_THE[span.row : span.row + span.count], wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_decode_of_many_keys_stays_close_to_float32() -> None:
    """Long groups take another way than short ones; both must give what float32 gives, up to rounding."""
    spans, num_blocks = placed([(length, 1) for length in (300, 290, 310, 299)], seed=1)
    generator = torch.Generator().manual_seed(1)
    heads = (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    pasts = [[torch.randn(n, s.start, HEAD_SIZE, generator=generator) for n in heads] for s in spans]
    now = [torch.randn(1, n, len(spans), HEAD_SIZE, generator=generator) for n in heads]
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        store = KvStore(num_blocks, BLOCK_SIZE)
        for span, past in zip(spans, pasts, strict=True):
            before = Placement((Span(0, 0, span.start, span.blocks),), tuple(span.blocks.tolist()))
            plan = StepPlan(before, block_size=BLOCK_SIZE, device=torch.device("cpu"), dtype=dtype)
            query, key, value = (state[None].to(dtype) for state in past)
            paged_attention(Layer(), query, key, value, None, paged=PagedStep(store, plan))
        plan = StepPlan(Placement(tuple(spans), ()), block_size=BLOCK_SIZE, device=torch.device("cpu"), dtype=dtype)
        query, key, value = (state.to(dtype) for state in now)
        output, _ = paged_attention(Layer(), query, key, value, None, paged=PagedStep(store, plan))
        outputs.append(output.float())
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.02, rtol=0.02)


@given(st.lists(st.integers(2, 5000), max_size=40))
def test_groups_hold_each_sequence_once_and_pad_little(ends: list[int]) -> None:
    spans = [Span(row, end - 1, 1, np.arange(1)) for row, end in enumerate(ends)]
    groups = group_by_length(spans)
    assert sorted(span.row for group in groups for span in group) == list(range(len(ends)))
    for group in groups:
        lengths = [span.end for span in group]
        assert max(lengths) <= min(lengths) * 1.5 + 64
        assert [span.row for span in group] == sorted(span.row for span in group)
