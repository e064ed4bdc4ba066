"""Where a step's tokens read and write the paged store: computed once a step, used by every layer.

Shapes: T tokens of the step, B sequences of a decode group, S keys, C tokens of a chunk.

Sequences with one token (decode) are attended in groups of similar length, one batched call each: a group's
keys are gathered by one index and padded to its longest. Sequences with more tokens (prefill chunks,
speculative windows) are attended one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from molink_stage_worker.engine.block_tables import Placement, Span

KEYS_OF_A_STRETCH = 16
"""Attention on tiles takes so many keys of a sequence at a time."""
_SHORT_CHUNK_TOKENS = 32
_TOKEN_BY_TOKEN = 8
"""Spans up to this length are attended token by token where attention is compiled."""
_GROUP_SLACK_TOKENS = 64
_GROUP_SLACK_SHARE = 1.5


@dataclass(frozen=True, slots=True)
class KeyView:
    """Which slots of the store a call reads: a run of memory, or blocks to gather; and what it must not see."""

    run: slice | None
    """One sequence whose blocks lie side by side: its keys as slots, no copy needed."""
    blocks_N: torch.Tensor | None
    """Else: the blocks of all B sequences, the same number for each."""
    batch: int
    keys: slice
    """Of the gathered keys of each sequence, the part that any of them needs."""
    mask: torch.Tensor | None
    """Added to the scores: 0 or −inf, ``[B, 1, 1, S]`` (decode) or ``[1, 1, C, S]`` (chunk)."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one token each, of similar length."""

    rows: slice | torch.Tensor
    """Of the step, in the group's order."""
    view: KeyView


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one sequence."""

    rows: slice
    view: KeyView | None
    """None: the chunk begins its sequence, so its keys are the step's own and plain causality is all."""
    short: bool
    """Few enough that folding a group's query heads into the query length costs less than repeating keys."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What layers of one kind (one sliding window, or none) read."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]

    @property
    def is_one_group(self) -> bool:
        """Whether one decode group holds every row in order."""
        return len(self.groups) == 1 and not self.chunks


@dataclass(frozen=True, slots=True)
class TokenReads:
    """What compiled attention reads (see `kernels.attend`): R tokens, each by itself; and what is left to torch."""

    rows_R: Any
    tables_R: Any
    ends_R: Any
    blocks_N: Any
    num_keys: int
    """That the tokens see, all together, if no window hides any."""
    has_chunks: bool
    """Whether some spans are long enough to be better off as chunks, by matrix products."""


@dataclass(frozen=True, slots=True)
class SpanReads:
    """What attention in bfloat16 reads (see `bf16_attention.attend`): B spans, each the tokens of one sequence."""

    firsts_B: Any
    counts_B: Any
    starts_B: Any
    tables_B: Any
    slots_N: Any
    """Of each stretch of 16 keys, the first slot. A block holds a whole number of stretches."""


class StepPlan:
    """One step's indices on the stage's device. `reads` depends on the layer's window and is kept by it."""

    def __init__(self, placement: Placement, *, block_size: int, device: torch.device, dtype: torch.dtype) -> None:
        spans = self._spans = placement.spans
        self.block_size = block_size
        self._device = device
        self._dtype = dtype
        self._reads: dict[int | None, Reads] = {}
        self._token_reads: TokenReads | None = None
        self._span_reads: SpanReads | None = None
        self._long_chunks: dict[int | None, tuple[Chunk, ...]] = {}
        positions_T, slots_T = _positions_and_slots(spans, block_size)
        self.num_tokens = len(positions_T)
        self.positions_1T = self._tensor(positions_T).unsqueeze(0)
        self.positions = positions_T
        """The same as an array in the host's memory."""
        self.slots_T = self._tensor(slots_T)
        self.slots = slots_T
        """The same as an array in the host's memory."""
        cleared = placement.blocks_to_clear
        self.blocks_to_clear = self._tensor(np.array(cleared, np.int64)) if cleared else None

    def reads(self, window: int | None) -> Reads:
        """What a layer reads that sees `window` keys back from each token, its own included (None: all)."""
        found = self._reads.get(window)
        if found is None:
            found = self._reads[window] = self._plan_reads(window)
        return found

    def span_reads(self) -> SpanReads:
        """Where each span finds its keys."""
        if self._span_reads is None:
            within = np.arange(0, self.block_size, KEYS_OF_A_STRETCH)
            tables = [
                (span.blocks[: -(-span.end // self.block_size), None] * self.block_size + within).reshape(-1)
                for span in self._spans
            ]
            ends = np.cumsum([len(table) for table in tables])
            self._span_reads = SpanReads(
                firsts_B=np.array([span.row for span in self._spans], np.int64),
                counts_B=np.array([span.count for span in self._spans], np.int64),
                starts_B=np.array([span.start for span in self._spans], np.int64),
                tables_B=np.concatenate([[0], ends[:-1]]).astype(np.int64),
                slots_N=np.concatenate(tables),
            )
        return self._span_reads

    def token_reads(self) -> TokenReads:
        """Where each token of a short span finds its keys."""
        if self._token_reads is None:
            self._token_reads = self._plan_token_reads()
        return self._token_reads

    def long_chunks(self, window: int | None) -> tuple[Chunk, ...]:
        """The spans that `token_reads` leaves out, for a layer with that window."""
        found = self._long_chunks.get(window)
        if found is None:
            chunks = [self._chunk(span, window) for span in self._spans if span.count > _TOKEN_BY_TOKEN]
            found = self._long_chunks[window] = tuple(chunks)
        return found

    def _plan_token_reads(self) -> TokenReads:
        spans = [span for span in self._spans if span.count <= _TOKEN_BY_TOKEN]
        rows, tables, ends, blocks = [], [], [], []
        table = 0
        for span in spans:
            own = span.blocks[: -(-span.end // self.block_size)]
            blocks.append(own)
            for offset in range(span.count):
                rows.append(span.row + offset)
                tables.append(table)
                ends.append(span.start + offset + 1)
            table += len(own)
        return TokenReads(
            rows_R=np.array(rows, np.int64),
            tables_R=np.array(tables, np.int64),
            ends_R=np.array(ends, np.int64),
            blocks_N=np.concatenate(blocks) if blocks else np.empty(0, np.int64),
            num_keys=sum(ends),
            has_chunks=len(spans) < len(self._spans),
        )

    def _plan_reads(self, window: int | None) -> Reads:
        decodes = [span for span in self._spans if span.count == 1 and span.end > 1]
        chunks = [span for span in self._spans if not (span.count == 1 and span.end > 1)]
        groups = group_by_length(decodes, window)
        return Reads(
            tuple(self._decode_group(group, window) for group in groups),
            tuple(self._chunk(span, window) for span in chunks),
        )

    def _decode_group(self, spans: Sequence[Span], window: int | None) -> DecodeGroup:
        rows = [span.row for span in spans]
        if rows[-1] - rows[0] == len(rows) - 1:
            return DecodeGroup(slice(rows[0], rows[-1] + 1), self._decode_view(spans, window))
        return DecodeGroup(self._tensor(np.array(rows, np.int64)), self._decode_view(spans, window))

    def _decode_view(self, spans: Sequence[Span], window: int | None) -> KeyView:
        size = self.block_size
        ends = np.array([span.end for span in spans], np.int64)
        firsts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        if len(spans) == 1:
            return self._view_of_one(spans[0], int(firsts[0]), None)
        first_blocks = firsts // size
        num_blocks = int((-(-ends // size) - first_blocks).max())
        blocks = np.empty((len(spans), num_blocks), np.int64)
        for index, span in enumerate(spans):
            own = span.blocks[first_blocks[index] : -(-span.end // size)]
            blocks[index, : len(own)] = own
            blocks[index, len(own) :] = own[-1]  # padding reads what is surely its own, hence finite
        # positions within each sequence's gathered keys
        lows, highs = firsts - first_blocks * size, ends - first_blocks * size
        mask = None
        # whole blocks: kernels are several times slower on a part of each sequence's keys, or on an odd number
        num_keys = num_blocks * size
        if lows.max() > 0 or highs.min() < num_keys:
            keys_S = np.arange(num_keys)
            hidden_BS = (keys_S < lows[:, None]) | (keys_S >= highs[:, None])
            mask = self._mask(hidden_BS)[:, None, None, :]
        return KeyView(None, self._tensor(blocks.reshape(-1)), len(spans), slice(0, num_keys), mask)

    def _chunk(self, span: Span, window: int | None) -> Chunk:
        rows = slice(span.row, span.row + span.count)
        short = span.count <= _SHORT_CHUNK_TOKENS
        if span.start == 0 and (window is None or span.count <= window):
            return Chunk(rows, None, short)
        first = 0 if window is None else max(0, span.start + 1 - window)
        queries_C = np.arange(span.start, span.end)[:, None]
        keys_S = np.arange(first, span.end)
        hidden_CS = keys_S > queries_C
        if window is not None:
            hidden_CS |= keys_S <= queries_C - window
        return Chunk(rows, self._view_of_one(span, first, self._mask(hidden_CS)[None, None]), short)

    def _view_of_one(self, span: Span, first: int, mask: torch.Tensor | None) -> KeyView:
        """Keys ``first .. end`` of one sequence."""
        size = self.block_size
        first_block = first // size
        blocks = span.blocks[first_block : -(-span.end // size)]
        keys = slice(first - first_block * size, span.end - first_block * size)
        if blocks[-1] - blocks[0] == len(blocks) - 1 and bool((np.diff(blocks) == 1).all()):
            begin = int(blocks[0]) * size
            return KeyView(slice(begin + keys.start, begin + keys.stop), None, 1, keys, mask)
        return KeyView(None, self._tensor(blocks), 1, keys, mask)

    def _tensor(self, array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)

    def _mask(self, hidden: Any) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(self._tensor(hidden), float("-inf"))


def group_by_length(spans: Sequence[Span], window: int | None = None) -> list[list[Span]]:
    """Sequences in groups whose padding costs less than one more call; each group in the order of its rows."""

    def visible(span: Span) -> int:
        return span.end if window is None else min(span.end, window)

    groups: list[list[Span]] = []
    shortest = 0
    for span in sorted(spans, key=visible):
        if not groups or visible(span) > shortest * _GROUP_SLACK_SHARE + _GROUP_SLACK_TOKENS:
            groups.append([])
            shortest = visible(span)
        groups[-1].append(span)
    return [sorted(group, key=lambda span: span.row) for group in groups]


def _positions_and_slots(spans: Sequence[Span], block_size: int) -> tuple[Any, Any]:
    if all(span.count == 1 for span in spans):
        positions = np.array([span.start for span in spans], np.int64)
        blocks = np.array([span.blocks[span.start // block_size] for span in spans], np.int64)
    else:
        parts = [np.arange(span.start, span.end) for span in spans]
        positions = np.concatenate(parts)
        blocks = np.concatenate([span.blocks[part // block_size] for span, part in zip(spans, parts, strict=True)])
    return positions, blocks * block_size + positions % block_size
