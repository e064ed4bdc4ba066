"""Guesses on the head's side: who gets some in a step, and what the right ones change (see `drafting`)."""

from __future__ import annotations

from molink_stage_worker.batch_sequence import Sequence, Served
from molink_stage_worker.drafting import Drafting
from molink_stage_worker.residents import Residents

_TURN_GAIN = 0.02


class Speculation:
    """Not thread-safe; no IO, no clock."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._drafting = Drafting()
        self.price: float | None = None
        """See `BatchPlan.draft_price`."""
        self.window = 1.0
        """Tokens that a sequence has in a decode step, lately; the guesses are among them."""
        self._gain = 1.0
        """Tokens that it gets from one."""
        self.drafted = 0
        self.accepted = 0

    def guess(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Tokens to be verified behind the newest one of a sequence that decodes, with blocks; `room` at most."""
        if self.price is None:
            return ()
        left = sequence.options.max_tokens - (len(sequence.tokens) - len(sequence.prompt)) - 1
        guesses = self._drafting.draft(
            sequence.guesser,
            sequence.tenant,
            sequence.tokens,
            least_chance=self.price * self._gain,
            most=min(room, left),
        )
        if guesses and not self._residents.has_spare_room(sequence, len(sequence.tokens) + len(guesses)):
            return ()
        return guesses

    def verified(self, served: Served, gained: int, *, in_decode: bool) -> None:
        """A step has brought a sequence so many tokens, which are among its `tokens` by now."""
        sequence, accepted = served.sequence, gained - 1
        if self.price is not None:
            self._drafting.remember(sequence.tenant, sequence.tokens, gained)
        if in_decode:
            self.window += _TURN_GAIN * (1 + served.drafts - self.window)
            self._gain += _TURN_GAIN * (gained - self._gain)
        if served.drafts:
            self.drafted += served.drafts
            self.accepted += accepted
            self._drafting.learn(sequence.guesser, served.drafts, accepted)

    def take_over(self, sequence: Sequence, accepted: int) -> None:
        """Keys and values of right guesses are on every stage: the sequence goes on behind them."""
        self._residents.shares.charge(sequence, sequence.planned, sequence.planned + accepted)
        sequence.planned += accepted
        sequence.confirmed = sequence.planned
        self._residents.publish(sequence)
