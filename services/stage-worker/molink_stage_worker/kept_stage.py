"""What of a stage outlives an epoch.

The engine with its KV blocks, the head's books, what was sent to the next stage, and the thread that computes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from molink_common.messages import AssignStage, ModelCard, Scheduling
from molink_stage_worker.batch_plan import BatchLimits
from molink_stage_worker.batching import Batcher
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.compute import StageCompute
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.grammars import Grammars
from molink_stage_worker.head_desk import HeadDesk
from molink_stage_worker.journal import Journal
from molink_stage_worker.planning.observation import Demand
from molink_stage_worker.planning.planner import Planner
from molink_stage_worker.sampling import Sampler

_BYTES_AN_OPENING_TOKEN = 8
"""In a frame's extra part: up to seven digits and a comma."""
_OF_ONE_EPOCH = ("epoch", "continues_epoch", "rebuild")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What this machine sets to any stage on it."""

    max_payload_bytes: int
    """Of a message."""
    step_tokens: int
    """Most tokens of a step that is planned here, as head."""
    max_running: int
    """Most sequences at work at once, as head."""
    journal_bytes: int
    """Of what was sent to the next stage, to be sent again when that is replaced."""
    prefix_cache: bool
    """Whether sequences begin with what others left in KV blocks, as head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptStage:
    """A loaded stage, without the epoch that it works in."""

    compute: StageCompute
    desk: HeadDesk | None
    """At the head only."""
    journal: Journal | None
    """None at the tail."""
    executor: ThreadPoolExecutor
    """Of one thread: passes of a former epoch end before those of the next begin."""


def make_stage(
    assignment: AssignStage,
    card: ModelCard,
    engine: Engine,
    executor: ThreadPoolExecutor,
    limits: StageLimits,
    folder: Callable[[], Path],
) -> KeptStage:
    """A stage that knows no sequence yet. `folder` gives the model's tokenizer, if grammars ask for it."""
    is_tail = assignment.index == assignment.num_stages - 1
    sampler = _make_sampler(card, folder) if is_tail else None
    return KeptStage(
        compute=StageCompute(engine, sampler, codecs=CodecChoice(assignment.codec)),
        desk=_make_desk(assignment, card, limits) if assignment.index == 0 else None,
        journal=None if is_tail else Journal(limits.journal_bytes, assignment.block_size),
        executor=executor,
    )


def _make_sampler(card: ModelCard, folder: Callable[[], Path]) -> Sampler:
    grammars = Grammars(folder, fingerprint=card.fingerprint, eos_token_ids=card.eos_token_ids)
    return Sampler(eos_token_ids=card.eos_token_ids, vocabulary_size=card.vocabulary_size, grammars=grammars)


def why_not_continued(held: AssignStage | None, order: AssignStage) -> str | None:
    """What keeps a worker from going on with the stage that it holds, as a sentence; None: nothing does."""
    if held is None:
        return f"epoch {order.continues_epoch} cannot be continued: this worker holds no stage"
    if (held.pipeline, held.epoch) != (order.pipeline, order.continues_epoch):
        return (
            f"epoch {order.continues_epoch} of pipeline {order.pipeline} cannot be continued: "
            f"this worker holds a stage of epoch {held.epoch} of pipeline {held.pipeline}"
        )
    changed = [
        name
        for name in AssignStage.model_fields
        if name not in _OF_ONE_EPOCH and getattr(held, name) != getattr(order, name)
    ]
    if changed:
        return f"epoch {order.continues_epoch} cannot be continued with another {' and '.join(changed)}"
    return None


def tokens_in_a_frame(max_payload_bytes: int, bytes_a_token: int, wanted: int) -> int:
    """How many tokens a step may have so that its hidden states take at most six tenths of a message.

    The rest is for what else a frame carries: a quarter for the prompts of sequences that open, tables, slack.
    """
    return max(min(wanted, max_payload_bytes * 6 // 10 // bytes_a_token), 1)


def _make_desk(assignment: AssignStage, card: ModelCard, limits: StageLimits) -> HeadDesk:
    token_bytes = assignment.dtype.size_bytes * card.hidden_size
    step_tokens = tokens_in_a_frame(limits.max_payload_bytes, token_bytes, limits.step_tokens)
    if assignment.policy.scheduling is not Scheduling.ADAPTIVE:
        step_tokens = max(step_tokens, card.context_length)  # the baselines compute a prompt as a whole
    planner = Planner(
        num_stages=assignment.num_stages,
        token_bytes=token_bytes,
        step_tokens=step_tokens,
        policy=assignment.policy,
    )
    batch_limits = BatchLimits(
        num_blocks=assignment.num_blocks,
        block_size=assignment.block_size,
        step_tokens=step_tokens,
        max_running=limits.max_running,
        opening_tokens=max(limits.max_payload_bytes // 4 // _BYTES_AN_OPENING_TOKEN, 1),
        prefix_secret=secrets.token_bytes() if limits.prefix_cache else None,
    )
    batcher = Batcher(batch_limits, planner.plan(Demand(decoding=0, context_tokens=0, prompt_tokens_waiting=0), 0.0))
    return HeadDesk(batcher, planner, token_bytes=token_bytes)
