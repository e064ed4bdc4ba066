"""What the clients ask. Decisions only: the same number gives the same request."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

_SUBJECTS = ("rivers", "glass", "bread", "clocks", "maps", "bridges", "paper", "salt", "wool", "lamps", "boats")
_PLACES = ("Norway", "Kenya", "Peru", "Japan", "Italy", "Canada", "India", "Spain", "Chile", "Ghana", "Nepal")
_WORDS = ("old", "small", "famous", "quiet", "cold", "useful", "rare", "heavy", "green", "round", "cheap", "bright")
_FEWEST_WORDS, _MOST_WORDS = 20, 130
_FEWEST_TOKENS, _MOST_TOKENS = 150, 200
_SAMPLED_EVERY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request that always has the same answer."""

    number: int
    text: str
    max_tokens: int
    temperature: float
    seed: int

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken; else the seed decides."""
        return self.temperature == 0

    def body(self, model: str) -> dict[str, Any]:
        """The request: answers of a fixed length, that tell their token ids."""
        return {
            "model": model,
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def make_prompts(count: int) -> list[Prompt]:
    """`count` different requests whose prompts and answers come to about 300 tokens; every fourth is sampled."""
    return [_prompt(number) for number in range(count)]


def _prompt(number: int) -> Prompt:
    dice = random.Random(number)
    subject, place = _SUBJECTS[number % len(_SUBJECTS)], _PLACES[number // len(_SUBJECTS) % len(_PLACES)]
    words = " ".join(dice.choices(_WORDS, k=dice.randint(_FEWEST_WORDS, _MOST_WORDS)))
    return Prompt(
        number=number,
        text=f"{number}: tell me at length about {subject} in {place}. Use these words: {words}.",
        max_tokens=dice.randint(_FEWEST_TOKENS, _MOST_TOKENS),
        temperature=0.8 if number % _SAMPLED_EVERY == _SAMPLED_EVERY - 1 else 0.0,
        seed=1000 + number,
    )
