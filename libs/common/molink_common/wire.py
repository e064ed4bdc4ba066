"""Activation frames: what one stage publishes for the next.

    ┌─────────────┬───────────────────┬───────────────┬──────────────┬────────────┬─────────┬───────────────────┐
    │ header 40 B │ entries 20 B each │ new KV blocks │ timings 24 B │ extra JSON │ padding │ hidden states T×H │
    └─────────────┴───────────────────┴───────────────┴──────────────┴────────────┴─────────┴───────────────────┘

Little-endian. The entries say which sequences the T rows belong to, in order; each names the KV blocks that
its sequence gets with this step (u32 each). Each stage that has computed the step adds a timing. `extra` carries
what only some steps need: sequences that open (with their options), sequences to forget, trace context. A stage
between head and tail passes the rest on as it came. Padding aligns the tensor to 16 bytes within the frame.

Nothing here runs code that a peer sent. Whatever does not parse, in any byte, is a `ProtocolError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molink_common import PROTOCOL_VERSION
from molink_common.errors import ProtocolError
from molink_common.messages import Dtype, SequenceIdField, TokenIds
from molink_common.sampling import SamplingOptions

_MAGIC = b"ML"
_HEADER = struct.Struct("<2sBBBBHIIQHHIII")
_ENTRY = struct.Struct("<QIIBBH")
_TIMING = struct.Struct("<IIIIII")
_BULK_FLAG = 1
_MAX_U32 = 0xFFFFFFFF
_ALIGNMENT = 16
_DTYPES = (Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16)
HEADER_BYTES = _HEADER.size
MAX_ENTRIES = 0xFFFF
MAX_STEP_TOKENS = 1 << 20
MAX_TIMINGS = 0xFFFF


class Logits(IntEnum):
    """For which of an entry's tokens the tail computes logits."""

    NONE = 0
    LAST = 1
    ALL = 2
    DRAFTS = 3
    """For all, and those behind the first are guesses at what comes next (`Extra.drafts`), to be verified."""


class Codec(IntEnum):
    """How the hidden states are encoded."""

    RAW = 0
    LOSSLESS = 1
    INT8 = 2
    ABSENT = 3
    """There are none, however many tokens the entries name: the stages in between only pass the step on."""


class Traffic(IntEnum):
    """The two classes of frames: a stage computes and sends decode before bulk."""

    DECODE = 0
    BULK = 1
    """Chunks of prompts, in steps of their own. Order holds within a class, not between the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """What a step cost at one stage, measured there."""

    compute_us: int
    waited_us: int
    """From the frame's arrival (at the head: from the plan) until its computation began."""
    tokens: int
    """Computed in the same pass, this step's and others'. 0: another step of the pass tells."""
    prompt_tokens: int
    sequences: int
    context_tokens: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of them, as they lie in a frame; `dataclasses.astuple` takes six times as long."""
        return (
            self.compute_us, self.waited_us, self.tokens, self.prompt_tokens, self.sequences, self.context_tokens
        )  # fmt: skip


_TIMING_FIELDS = tuple(field.name for field in fields(StageTiming))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`count` tokens of one sequence from position `start` on, in one step."""

    sequence: int
    start: int
    count: int
    opens: bool = False
    """The sequence begins (again): forget its block table."""
    logits: Logits = Logits.NONE
    new_blocks: tuple[int, ...] = ()

    @property
    def places_with_logits(self) -> range:
        """The positions for which the tail computes a row of logits."""
        end = self.start + self.count
        return range((end, end - 1, self.start, self.start)[self.logits], end)


class Opening(BaseModel):
    """What the tail must know of a sequence that opens: prompt and tokens so far, and how to sample."""

    model_config = ConfigDict(frozen=True)
    sequence: SequenceIdField
    prompt: TokenIds
    generated: TokenIds = ()
    options: SamplingOptions
    cached_tokens: Annotated[int, Field(ge=0)] = 0
    """How many of the prompt's tokens were in KV blocks already when the sequence began; the tail tells the gateway."""


class Extra(BaseModel):
    """The part of a frame that only some steps need."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    opens: tuple[Opening, ...] = ()
    closes: Annotated[dict[SequenceIdField, int], Field(max_length=MAX_ENTRIES)] = {}
    """Finished, cancelled or preempted: every stage forgets them before it runs the step's entries, unless a later
    step than the one named here has opened the sequence anew."""
    traces: Annotated[dict[SequenceIdField, str], Field(max_length=MAX_ENTRIES)] = {}
    """W3C ``traceparent`` of the sequences that are sampled for tracing."""
    rebuild: Annotated[int, Field(ge=1)] | None = None
    """The step's tokens are computed again for this one stage, whose KV blocks are empty. The stage before it attaches
    the hidden states that it has kept of these tokens; all others have them in their KV blocks and pass the step on."""
    refused: Annotated[tuple[SequenceIdField, ...], Field(max_length=MAX_ENTRIES)] = ()
    """Of whose tokens in this step a stage on the way could make nothing: what it had of them does not fit."""
    drafts: Annotated[dict[SequenceIdField, TokenIds], Field(max_length=MAX_ENTRIES)] = {}
    """The guesses of the entries that have some: the tail samples on for as long as they are right."""

    def encode(self) -> bytes:
        """JSON, or nothing when there is nothing to say."""
        if not (self.opens or self.closes or self.traces or self.refused or self.drafts or self.rebuild is not None):
            return b""
        return orjson.dumps(self.model_dump(), option=orjson.OPT_NON_STR_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFrame:
    """One step of one micro-batch on its way through a pipeline."""

    pipeline: int
    epoch: int
    step: int
    entries: tuple[Entry, ...]
    extra: bytes
    """Encoded `Extra`; decode with `decode_extra`. Kept as bytes so that a middle stage only copies it."""
    hidden_size: int
    dtype: Dtype
    hidden: memoryview
    """T × hidden_size scalars, row by row, as `codec` says. One-dimensional, format ``B``."""
    codec: Codec = Codec.RAW
    traffic: Traffic = Traffic.DECODE
    timings: tuple[StageTiming, ...] = ()
    """Of the stages that the step has passed, head first."""

    @property
    def num_tokens(self) -> int:
        """T, the rows of the hidden states."""
        return sum(entry.count for entry in self.entries)


def decode_extra(data: bytes | memoryview) -> Extra:
    """The inverse of `Extra.encode`.

    Raises:
        ProtocolError: it does not parse.
    """
    if len(data) == 0:
        return Extra()
    try:
        return Extra.model_validate(orjson.loads(data))
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise ProtocolError(f"a frame's extra part does not parse: {error}") from error


def encode_frame(frame: StepFrame) -> bytearray:
    """The frame as one buffer, ready to publish.

    Raises:
        ValueError: the hidden states are not `num_tokens × hidden_size` scalars, or are there though they should be
            absent (our own mistake).
    """
    num_tokens = frame.num_tokens
    if frame.codec is Codec.RAW and len(frame.hidden) != num_tokens * frame.hidden_size * frame.dtype.size_bytes:
        raise ValueError(f"{len(frame.hidden)} bytes for {num_tokens} tokens of {frame.hidden_size} {frame.dtype}")
    if frame.codec is Codec.ABSENT and len(frame.hidden):
        raise ValueError(f"{len(frame.hidden)} bytes of hidden states that are said to be absent")
    num_blocks = sum(len(entry.new_blocks) for entry in frame.entries)
    tensor_at = _tensor_offset(len(frame.entries), num_blocks, len(frame.timings), len(frame.extra))
    out = bytearray(tensor_at + len(frame.hidden))
    _HEADER.pack_into(
        out, 0, _MAGIC, PROTOCOL_VERSION, 0, _DTYPES.index(frame.dtype), frame.codec,
        _BULK_FLAG if frame.traffic is Traffic.BULK else 0,
        frame.pipeline, frame.epoch, frame.step, len(frame.entries), len(frame.timings), num_blocks,
        len(frame.extra), frame.hidden_size,
    )  # fmt: skip
    at = HEADER_BYTES
    for entry in frame.entries:
        flags = (1 if entry.opens else 0) | (entry.logits << 1)
        _ENTRY.pack_into(out, at, entry.sequence, entry.start, entry.count, flags, 0, len(entry.new_blocks))
        at += _ENTRY.size
    blocks = [block for entry in frame.entries for block in entry.new_blocks]
    struct.pack_into(f"<{num_blocks}I", out, at, *blocks)
    at += 4 * num_blocks
    for timing in frame.timings:
        _TIMING.pack_into(out, at, *(min(number, _MAX_U32) for number in timing.numbers))
        at += _TIMING.size
    out[at : at + len(frame.extra)] = frame.extra
    out[tensor_at:] = frame.hidden
    return out


def decode_frame(data: bytes | bytearray | memoryview) -> StepFrame:
    """The frame in `data`; `hidden` is a view of it, not a copy.

    Raises:
        ProtocolError: anything about it is not a frame of this version.
    """
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise ProtocolError(f"a frame of {len(view)} bytes is shorter than its header")
    (magic, version, kind, dtype_code, codec, flags, pipeline, epoch, step, num_entries, num_timings, num_blocks,
     extra_bytes, hidden_size) = _HEADER.unpack_from(view)  # fmt: skip
    if magic != _MAGIC:
        raise ProtocolError("not a MoLink frame")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"frame version {version}, this side speaks {PROTOCOL_VERSION}")
    if kind != 0 or flags > _BULK_FLAG or codec > Codec.ABSENT or dtype_code >= len(_DTYPES):
        raise ProtocolError("a frame with a kind, flag, codec or dtype that this version does not know")
    tensor_at = _tensor_offset(num_entries, num_blocks, num_timings, extra_bytes)
    if tensor_at > len(view):
        raise ProtocolError(f"a frame of {len(view)} bytes whose tables alone need {tensor_at}")
    entries = _decode_entries(view, num_entries, num_blocks)
    num_tokens = sum(entry.count for entry in entries)
    dtype = _DTYPES[dtype_code]
    expected = num_tokens * hidden_size * dtype.size_bytes
    # what an encoded tensor must look like is for its codec to check
    exactly = {Codec.RAW: expected, Codec.ABSENT: 0}.get(codec)
    if num_tokens > MAX_STEP_TOKENS or (exactly is not None and len(view) - tensor_at != exactly):
        raise ProtocolError(f"a frame with {len(view) - tensor_at} tensor bytes where {expected} belong")
    timings_at = HEADER_BYTES + _ENTRY.size * num_entries + 4 * num_blocks
    extra_at = timings_at + _TIMING.size * num_timings
    timings = tuple(
        StageTiming(**dict(zip(_TIMING_FIELDS, values, strict=True)))
        for values in _TIMING.iter_unpack(view[timings_at:extra_at])
    )
    return StepFrame(
        pipeline=pipeline,
        epoch=epoch,
        step=step,
        entries=entries,
        extra=bytes(view[extra_at : extra_at + extra_bytes]),
        hidden_size=hidden_size,
        dtype=dtype,
        hidden=view[tensor_at:].cast("B"),
        codec=Codec(codec),
        traffic=Traffic.BULK if flags & _BULK_FLAG else Traffic.DECODE,
        timings=timings,
    )


def _tensor_offset(num_entries: int, num_blocks: int, num_timings: int, extra_bytes: int) -> int:
    end = HEADER_BYTES + _ENTRY.size * num_entries + 4 * num_blocks + _TIMING.size * num_timings + extra_bytes
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _decode_entries(view: memoryview, num_entries: int, num_blocks: int) -> tuple[Entry, ...]:
    blocks = struct.unpack_from(f"<{num_blocks}I", view, HEADER_BYTES + _ENTRY.size * num_entries)
    entries: list[Entry] = []
    block_at = 0
    for index in range(num_entries):
        sequence, start, count, flags, reserved, taken = _ENTRY.unpack_from(view, HEADER_BYTES + _ENTRY.size * index)
        logits = flags >> 1
        if count == 0 or reserved != 0 or logits > Logits.DRAFTS or block_at + taken > num_blocks:
            raise ProtocolError(f"entry {index} of a frame is not valid")
        entries.append(
            Entry(
                sequence=sequence,
                start=start,
                count=count,
                opens=bool(flags & 1),
                logits=Logits(logits),
                new_blocks=blocks[block_at : block_at + taken],
            )
        )
        block_at += taken
    if block_at != num_blocks:
        raise ProtocolError("a frame with KV blocks that no entry takes")
    return tuple(entries)
