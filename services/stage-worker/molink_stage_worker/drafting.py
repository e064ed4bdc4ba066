"""Guesses at the next tokens of a sequence: drafts that a step has the stages verify.

A step computes a sequence's newest token and a few guesses behind it in one trip round the pipeline; the tail samples
place after place for as long as the guesses were right. So a right guess is a token without a trip of its own, a wrong
one costs its computing, and the text is the same as without: the tail's choice at a place is a function of what is
before it (see `sampling`).

What is guessed: what followed the last few tokens where they stood before, in the same text (prompt lookup, Saxena
2023), else in what was answered to the same tenant lately (as in SuffixDecoding, arXiv 2411.04975, though only the
last three tokens count here). Quotes, code, names and turns of phrase come again, and no other model is needed. As
with the prefix cache, tenants learn nothing of each other, not even from a fast answer.

How many guesses are worth their computing: one is taken while its chance to be right is larger than the price of
computing it, both measured (`BatchPlan.draft_price`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

MOST_DRAFTS = 7
"""With the newest token these are eight: as many as attention takes token by token (see `engine.step_plan`)."""
_WORDS = (3, 2)
"""How many tokens have to be alike in the same text, the best first."""
_WORDS_OF_OTHERS = 3
_MOST_PLACES = 8192
"""A longer text is looked through from there on."""
_MOST_PHRASES = 65536
_MOST_TENANTS = 32
_FADE = 0.9
_PRIOR = 2.0
"""What all sequences have shown counts for so many guesses of one."""
_FADE_OF_ALL = 0.99
_PRIOR_OF_ALL = 8.0
_CHANCE = 0.5
"""Before anything is known."""
_REFUSALS_A_TRY = 16
_FIRST_REFUSALS, _FIRST_REFUSALS_A_TRY = 64, 4
"""Larger steps now and then are also what links and stages are first known by."""


class Source(Enum):
    """Where a guess comes from."""

    OWN_TEXT = "own text"
    OTHER_TEXTS = "other texts"


class Lookup:
    """Where the last tokens of a growing text stood before."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        """By a few tokens, the place behind them, the last one that something follows at."""
        self._followed = 0

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may come next, `most` tokens; none where the last ones are new. `tokens` only ever grows."""
        self._follow(tokens)
        for words in _WORDS:
            place = self._places.get(tuple(tokens[-words:]))
            if place is not None:
                found = list(tokens[place : place + most])
                while len(found) < most:  # the text repeats itself up to its end: it goes on doing so
                    found.append(found[len(found) - (len(tokens) - place)])
                return tuple(found)
        return ()

    def _follow(self, tokens: Sequence[int]) -> None:
        first = max(self._followed, len(tokens) - _MOST_PLACES, _WORDS[-1])
        for place in range(first, len(tokens)):
            for words in _WORDS:
                if place >= words:
                    self._places[tuple(tokens[place - words : place])] = place
        self._followed = len(tokens)


class Phrases:
    """What followed three tokens in the texts of one tenant, the last time. The oldest is forgotten first."""

    def __init__(self, most: int = _MOST_PHRASES) -> None:
        self._most = most
        self._next: OrderedDict[tuple[int, ...], int] = OrderedDict()

    def learn(self, tokens: Sequence[int], count: int) -> None:
        """The last `count` of these tokens are new."""
        for place in range(max(len(tokens) - count, _WORDS_OF_OTHERS), len(tokens)):
            phrase = tuple(tokens[place - _WORDS_OF_OTHERS : place])
            self._next[phrase] = tokens[place]
            self._next.move_to_end(phrase)
        while len(self._next) > self._most:
            self._next.popitem(last=False)

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may come next: guess after guess, up to the first phrase that nobody has used, `most` at most."""
        found = list(tokens[-_WORDS_OF_OTHERS:])
        if len(found) < _WORDS_OF_OTHERS:
            return ()
        while len(found) < _WORDS_OF_OTHERS + most:
            token = self._next.get(tuple(found[-_WORDS_OF_OTHERS:]))
            if token is None:
                break
            found.append(token)
        return tuple(found[_WORDS_OF_OTHERS:])


class Record:
    """How often guesses were right, the latest ones counting most."""

    def __init__(self, fade: float) -> None:
        self._fade = fade
        self._right = 0.0
        self._verified = 0.0

    def learn(self, drafted: int, accepted: int) -> None:
        """Of `drafted` guesses the first `accepted` were right; the one behind these was wrong."""
        verified = min(accepted + 1, drafted)
        self._right = self._right * self._fade + accepted
        self._verified = self._verified * self._fade + verified

    def chance(self, believed: float, weight: float) -> float:
        """That a guess is right, if the ones before it are. `believed` counts for `weight` guesses."""
        return (self._right + believed * weight) / (self._verified + weight)


class Guesser:
    """Of one sequence."""

    def __init__(self) -> None:
        self.lookup = Lookup()
        self.records = {source: Record(_FADE) for source in Source}
        self.source = Source.OWN_TEXT
        """Of the guesses that are being verified."""


class Drafting:
    """What a head knows of guessing. No IO, no clock, no chance."""

    def __init__(self) -> None:
        self._all = {source: Record(_FADE_OF_ALL) for source in Source}
        self._phrases: OrderedDict[str, Phrases] = OrderedDict()
        """By tenant, who was served longest ago first."""
        self._refusals = 0

    def draft(
        self, guesser: Guesser, tenant: str, tokens: Sequence[int], *, least_chance: float, most: int
    ) -> tuple[int, ...]:
        """Guesses that are worth their computing: each is right with at least this chance. `most` bounds them."""
        most = min(most, MOST_DRAFTS)
        if most < 1 or least_chance >= 1.0:
            return ()
        guesser.source = Source.OWN_TEXT
        guesses = guesser.lookup.guess(tokens, most)
        if not guesses and tenant in self._phrases:
            guesser.source = Source.OTHER_TEXTS
            guesses = self._phrases[tenant].guess(tokens, most)
        if not guesses:
            return ()
        believed = self._all[guesser.source].chance(_CHANCE, _PRIOR_OF_ALL)
        chance = guesser.records[guesser.source].chance(believed, _PRIOR)
        count = 0
        all_right = chance
        while count < len(guesses) and all_right >= least_chance:
            count += 1
            all_right *= chance
        if count == 0:
            # a text may begin to repeat itself, and what is never tried stays misjudged
            self._refusals += 1
            pause = _FIRST_REFUSALS_A_TRY if self._refusals <= _FIRST_REFUSALS else _REFUSALS_A_TRY
            count = 1 if self._refusals % pause == 0 else 0
        return guesses[:count]

    def learn(self, guesser: Guesser, drafted: int, accepted: int) -> None:
        """The tail has verified guesses of a sequence."""
        self._all[guesser.source].learn(drafted, accepted)
        guesser.records[guesser.source].learn(drafted, accepted)

    def remember(self, tenant: str, tokens: Sequence[int], count: int) -> None:
        """The last `count` tokens of a text have been chosen."""
        phrases = self._phrases.setdefault(tenant, Phrases())
        self._phrases.move_to_end(tenant)
        phrases.learn(tokens, count)
        while len(self._phrases) > _MOST_TENANTS:
            self._phrases.popitem(last=False)
