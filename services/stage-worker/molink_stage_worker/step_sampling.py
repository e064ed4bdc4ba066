"""What the tail's sampler does for a step: who is known, whose rows of logits count, which guesses were right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from molink_common.errors import ProtocolError
from molink_common.identity import sequence_id
from molink_common.messages import PromptLogprobs, StepTokens, TokenEvent
from molink_common.wire import Entry, Logits, StageTiming
from molink_stage_worker.prompt_logprobs import told_by
from molink_stage_worker.sampling import Sampler
from molink_stage_worker.stage_step import StageStep


def prepare(sampler: Sampler, steps: Sequence[StageStep], closed: Sequence[tuple[str, ...]]) -> None:
    """Close and open what steps that are computed together say.

    Raises:
        ProtocolError: a sequence wants a token that was never opened, or its guesses are not those that were named.
    """
    for names in closed:
        for name in names:
            sampler.close(name)
    for step in steps:
        for opening in step.extra.opens:
            sampler.open(opening)
        for entry in step.frame.entries:
            if entry.logits is not Logits.NONE and not sampler.knows(sequence_id(entry.sequence)):
                raise ProtocolError(f"sequence {sequence_id(entry.sequence)} wants a token but was never opened")
            if entry.logits is Logits.DRAFTS:
                named = len(step.extra.drafts.get(sequence_id(entry.sequence), ()))
                if named != entry.count - 1:
                    raise ProtocolError(
                        f"{entry.count} tokens of sequence {sequence_id(entry.sequence)}, {named} guesses"
                    )


def sampled(sampler: Sampler, step: StageStep, logits_RV: torch.Tensor | None, timing: StageTiming) -> StepTokens:
    """The step's tokens, from one row of logits for each of its places that has any; None: for none."""
    frame = step.frame
    events: list[TokenEvent] = []
    failed: list[str] = []
    told: list[PromptLogprobs] = []
    if logits_RV is not None and logits_RV.shape[0]:
        names, rows = _rows_to_sample(sampler, frame.entries)
        if _asks_for_all(frame.entries):
            told, failed = _told_of_prompts(sampler, logits_RV, frame.entries)
            kept = [place for place, name in enumerate(names) if name not in failed]
            names, rows = [names[place] for place in kept], [rows[place] for place in kept]
        drafts = step.extra.drafts
        while names:
            wanted_RV = logits_RV if len(rows) == logits_RV.shape[0] else logits_RV[rows]
            found, unsound = sampler.sample(wanted_RV, names)
            events += found
            failed += unsound
            names, rows, drafts = _where_guesses_are_right(found, dict(zip(names, rows, strict=True)), drafts)
    # built without validation: this runs for every step, and every value is our own
    return StepTokens.model_construct(
        pipeline=frame.pipeline,
        epoch=frame.epoch,
        step=frame.step,
        events=tuple(events),
        failed=tuple(failed),
        refused=step.extra.refused,
        prompt_logprobs=tuple(told),
        timings=tuple(one.numbers for one in (*frame.timings, timing)),
    )


def _told_of_prompts(
    sampler: Sampler, logits_RV: torch.Tensor, entries: tuple[Entry, ...]
) -> tuple[list[PromptLogprobs], list[str]]:
    """What the entries that ask for all rows tell of their prompts, and the sequences whose logits are not finite."""
    told: list[PromptLogprobs] = []
    failed: list[str] = []
    row = 0
    for entry in entries:
        first, row = row, row + len(entry.places_with_logits)
        name = sequence_id(entry.sequence)
        if entry.logits is not Logits.ALL:
            continue
        prompt, likeliest = sampler.asked_of_prompt(name)
        if likeliest is None or entry.start + 1 >= len(prompt):
            continue
        part = told_by(logits_RV[first:row], sequence=name, prompt=prompt, start=entry.start, likeliest=likeliest)
        if part is None:
            failed.append(name)
        else:
            told.append(part)
    return told, failed


def _where_guesses_are_right(
    events: list[TokenEvent], rows: dict[str, int], drafts: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[int], dict[str, tuple[int, ...]]]:
    """Whose next guess is the token just chosen: who goes on, with which row of logits, and the guesses left."""
    left = {
        event.sequence: guesses[1:]
        for event in events
        if event.finish is None and (guesses := drafts.get(event.sequence)) and guesses[0] == event.token
    }
    return list(left), [rows[name] + 1 for name in left], left


def _asks_for_all(entries: tuple[Entry, ...]) -> bool:
    return any(entry.logits is Logits.ALL for entry in entries)


def _rows_to_sample(sampler: Sampler, entries: tuple[Entry, ...]) -> tuple[list[str], list[int]]:
    """Who gets a token, and the row of logits that it comes from: that of the last token that the sequence has.

    A chunk that asks for all rows may end in the middle of the prompt; guesses stand behind the last token.
    """
    names: list[str] = []
    rows: list[int] = []
    count = 0
    for entry in entries:
        if entry.logits is Logits.NONE:
            continue
        first, count = count, count + len(entry.places_with_logits)
        name = sequence_id(entry.sequence)
        if entry.logits is Logits.DRAFTS:
            names.append(name)
            rows.append(first)
        elif entry.logits is Logits.LAST or sampler.is_next(name, entry.start + entry.count):
            names.append(name)
            rows.append(count - 1)
    return names, rows
