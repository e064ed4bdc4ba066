"""Whose prompts get on in a step, and by how many tokens."""

from __future__ import annotations

from collections.abc import Sequence as Listing

from molink_stage_worker.batch_sequence import Sequence
from molink_stage_worker.fair_queue import Shares

_TURNS = 3
_A_LITTLE = 4
"""A chunk may grow by this part of it."""
MOST_LOGIT_ROWS = 128
"""A step, for prompts whose log probabilities are told or for guesses: the tail holds a row of the vocabulary for each
token."""


class ChunkChoice:
    """The tenant served least first; of its prompts, those that have waited through most losses.

    Of these every third time the one that came first, else the one nearest to its end. Each loss would else begin with
    the same short ones, and the longest would wait through them all. Were all served alike, all would end late. So
    short prompts pass long ones, but cannot hold them up for ever. A step stops opening sequences once their prompts
    together pass `opening_tokens`, and takes at most `MOST_LOGIT_ROWS` tokens of prompts whose log probabilities are
    told. A prompt whose rest is only a little more than that gets all of it: a pass for a few tokens costs almost as
    much as one for many.
    """

    def __init__(self, opening_tokens: int, shares: Shares) -> None:
        self._opening_tokens = opening_tokens
        self._shares = shares
        self._turns = 0

    def choose(self, prompts: Listing[Sequence], budget: int, most: int) -> dict[str, int]:
        """Tokens by sequence, about `budget` together, `most` in any case."""
        self._turns += 1
        is_first_come = self._turns % _TURNS == 1
        ordered = sorted(
            prompts,
            key=lambda one: (
                self._shares.served(one.tenant),
                one.priority,
                -one.interruptions,
                0 if is_first_come else one.unplanned,
                one.arrival,
            ),
        )
        chosen: dict[str, int] = {}
        rows = MOST_LOGIT_ROWS
        opening = 0
        for sequence in ordered:
            if budget <= 0:
                break
            if sequence.tells_prompt and rows == 0:
                continue
            if not sequence.is_open:
                if opening and opening + sequence.opening_tokens > self._opening_tokens:
                    continue
                opening += sequence.opening_tokens
            rest = min(budget + budget // _A_LITTLE, most)
            chosen[sequence.id] = sequence.unplanned if sequence.unplanned <= rest else min(budget, most)
            if sequence.tells_prompt:
                chosen[sequence.id] = min(chosen[sequence.id], rows)
                rows -= chosen[sequence.id]
            budget -= chosen[sequence.id]
            most -= chosen[sequence.id]
        return chosen
