"""The choices of a request, growing from its mailbox."""

from __future__ import annotations

from molink_common.identity import SequenceId, new_sequence_id
from molink_common.logs import get_logger
from molink_common.messages import FinishReason, SubmitSequence
from molink_common.sampling import SamplingOptions
from molink_gateway.access_log import RequestRecord
from molink_gateway.api_errors import ApiError
from molink_gateway.choice import Delta
from molink_gateway.mailbox import Mailbox
from molink_gateway.preparation import Prepared
from molink_gateway.replies import Chunk, usage_of
from molink_gateway.sequences import Sequences, Submission
from molink_gateway.stream_place import Part, Place

log = get_logger("gateway.run")

_WAIT_S = 10.0
"""For tokens at a time; the mailbox knows when to give up."""


class Run:
    """Feeds tokens to choices, stops what has met a stop string, and counts."""

    def __init__(self, prepared: Prepared, mailbox: Mailbox, sequences: Sequences, record: RequestRecord) -> None:
        self._prepared = prepared
        self._mailbox = mailbox
        self._sequences = sequences
        self._record = record
        self._num_going_on = len(prepared.choices)
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._held: dict[int, Delta] = {}
        """By choice: what comes behind a prompt whose log probabilities are not all here."""

    @property
    def is_going_on(self) -> bool:
        """Whether a choice has not ended."""
        return self._num_going_on > 0

    def usage(self) -> Chunk:
        """Token counts so far."""
        return usage_of(self._prepared.num_prompt_tokens, self._num_tokens, self._num_cached_tokens)

    def place(self, part: Part) -> str | None:
        """The id of the event that is told now; None for an answer of several sequences."""
        stream = self._prepared.stream
        return None if stream is None else Place(sequence=stream, num_tokens=self._num_tokens, part=part).encode()

    async def grow(self, wait_s: float) -> list[tuple[int, Delta]]:
        """What the choices grew by; empty when nothing came for `wait_s`. What the client has is left out.

        Raises:
            ApiError: the request cannot be answered to its end.
        """
        deltas: dict[int, Delta] = {}
        for choice, event in await self._mailbox.take(wait_s):
            growing = self._prepared.choices[choice]
            if growing.finish is not None:
                continue
            self._record.saw_token()
            if choice % self._prepared.num_choices == 0:  # a prompt counts once, however many answers it has
                self._num_cached_tokens += event.cached_tokens or 0
            delta = growing.feed(event)
            if self._prepared.drops_answer:
                delta = Delta(finish=FinishReason.LENGTH)
            else:
                self._num_tokens += 1
                delta = self._untold(delta)
            known = deltas.get(choice)
            deltas[choice] = delta if known is None else known.joined(delta)
            if growing.finish is not None:
                self._num_going_on -= 1
                if growing.is_cut_short:
                    await self._cut(self._prepared.submission.ids[choice], growing.num_tokens)
        self._record.completion_tokens = self._num_tokens
        if not self.is_going_on and any(not prompt.is_complete for prompt in self._prepared.prompts):
            await self._have_prompts_told_again()
        return self._behind_prompts(deltas)

    def _behind_prompts(self, deltas: dict[int, Delta]) -> list[tuple[int, Delta]]:
        """Of what has come, now and before, what may be told: a prompt's log probabilities go first."""
        if not self._prepared.prompts:
            return list(deltas.items())
        for choice, delta in deltas.items():
            held = self._held.get(choice)
            self._held[choice] = delta if held is None else held.joined(delta)
        ready = [choice for choice in self._held if self._prepared.prompts[choice].is_complete]
        return [(choice, self._held.pop(choice)) for choice in ready]

    async def _have_prompts_told_again(self) -> None:
        """Some log probabilities of prompts were lost on their way here, and nobody keeps them: compute them again."""
        lacking = [
            (one, inbox)
            for one in self._prepared.submission.sequences
            if (inbox := self._prepared.submission.prompts.get(one.sequence)) is not None and not inbox.is_complete
        ]
        log.info("prompts are computed again for log probabilities that were lost", prompts=len(lacking))
        again = {new_sequence_id(): pair for pair in lacking}
        submission = Submission(
            sequences=tuple(_telling_the_prompt(one, sequence) for sequence, (one, _) in again.items()),
            prompts={sequence: inbox for sequence, (_, inbox) in again.items()},
        )
        async with self._sequences.open(submission) as mailbox:
            while not all(map(mailbox.has_ended, mailbox.sequences)):
                await mailbox.take(_WAIT_S)
        if any(not inbox.is_complete for _, inbox in lacking):
            raise ApiError(
                503,
                "Log probabilities of the prompt were lost on their way. Try again.",
                code="stalled",
                retry_after_s=1,
            )

    async def _cut(self, sequence: SequenceId, num_tokens: int) -> None:
        is_kept = self._mailbox.outlives_client and self._mailbox.has_ended(sequence)
        if not is_kept:  # what is kept for a client that may come back needs no stopping, and must stay
            await self._sequences.cut(sequence, num_tokens)

    def _untold(self, delta: Delta) -> Delta:
        """Of a stream that is taken up: what comes after the client's last event."""
        told = self._prepared.told
        if told is None or self._num_tokens > told.num_tokens:
            return delta
        finish = delta.finish if told.part is Part.TEXT else None
        return Delta(finish=finish, has_called=delta.has_called)


def _telling_the_prompt(one: SubmitSequence, sequence: SequenceId) -> SubmitSequence:
    """The same prompt under another id, for its log probabilities alone."""
    options = SamplingOptions(max_tokens=1, temperature=0.0, prompt_logprobs=one.options.prompt_logprobs)
    # a request counts once against what its key allows
    changes = {"sequence": sequence, "options": options, "resume_state": None, "choice": max(one.choice, 1)}
    return one.model_copy(update=changes)
