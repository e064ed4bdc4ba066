"""Guesses at what comes next: where they come from, and how many are worth it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink_stage_worker.drafting import MOST_DRAFTS, Drafting, Guesser, Lookup, Phrases


@pytest.mark.parametrize(
    ("text", "most", "guess"),
    [
        ([], 3, ()),
        ([1, 2, 3], 3, ()),
        ([1, 2, 3, 4, 9, 1, 2], 2, (3, 4)),
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], 1, (3,)),  # three alike before two alike
        ([5, 1, 2, 3, 6, 1, 2, 4, 1, 2], 1, (4,)),  # else the last place
        ([7, 8, 9, 7, 8], 7, (9, 7, 8, 9, 7, 8, 9)),  # what repeats itself goes on doing so
        ([4, 4, 4], 5, (4, 4, 4, 4, 4)),
    ],
)
def test_what_followed_the_last_tokens_before_is_guessed(text: list[int], most: int, guess: tuple[int, ...]) -> None:
    assert Lookup().guess(text, most) == guess


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 7), st.lists(st.integers(1, 60), max_size=5))
def test_a_text_that_was_followed_gives_the_guesses_of_one_seen_at_once(
    text: list[int], most: int, stops: list[int]
) -> None:
    lookup = Lookup()
    for stop in sorted(stops):
        lookup.guess(text[:stop], most)
    guess = lookup.guess(text, most)
    assert guess == Lookup().guess(text, most)
    assert len(guess) in (0, most)
    if guess:
        assert any(text[at : at + 3] == [*text[-2:], guess[0]] for at in range(len(text)))


def drafts(drafting: Drafting, guesser: Guesser, least_chance: float, most: int = 7) -> int:
    return len(drafting.draft(guesser, "", [7, 8, 9, 7, 8], least_chance=least_chance, most=most))


def test_more_is_guessed_where_it_costs_little_and_was_right() -> None:
    drafting, guesser = Drafting(), Guesser()
    assert drafts(drafting, guesser, 0.2) == 2  # a half is believed, a quarter is above the price, an eighth is not
    for _ in range(20):
        drafting.learn(guesser, 4, 4)
    assert drafts(drafting, guesser, 0.2) == MOST_DRAFTS
    assert drafts(drafting, guesser, 0.2, most=3) == 3
    assert drafts(drafting, guesser, 1.0) == 0
    assert drafts(drafting, Guesser(), 0.6) > 0, "what others have shown counts for a newcomer"
    for _ in range(60):
        drafting.learn(guesser, 4, 0)
    assert drafts(drafting, guesser, 0.2) == 0


def test_who_was_wrong_is_tried_again_now_and_then() -> None:
    drafting, guesser = Drafting(), Guesser()
    for _ in range(50):
        drafting.learn(guesser, 4, 0)
    assert sum(drafts(drafting, guesser, 0.5) for _ in range(64)) == 16
    assert sum(drafts(drafting, guesser, 0.5) for _ in range(64)) == 4, "ever more rarely"
    assert sum(drafts(drafting, guesser, 1.0) for _ in range(16)) == 0, "not where even a certain guess does not pay"


def test_what_others_were_answered_is_guessed_where_the_own_text_is_new() -> None:
    drafting = Drafting()
    drafting.remember("a", [1, 2, 3, 4, 5, 6], 3)  # 1, 2 and 3 are its prompt
    for text, guesses in (([9, 1, 2, 3], (4, 5, 6)), ([2, 3, 4], (5, 6)), ([1, 2], ()), ([4, 5, 6], ())):
        assert drafting.draft(Guesser(), "a", text, least_chance=0.0, most=7) == guesses
        assert drafting.draft(Guesser(), "b", text, least_chance=0.0, most=7) == (), "another tenant's"
    own = [1, 2, 3, 8, 1, 2, 3]
    assert drafting.draft(Guesser(), "a", own, least_chance=0.0, most=2) == (8, 1), "its own text before others'"


def test_the_two_sources_are_judged_apart() -> None:
    drafting, guesser = Drafting(), Guesser()
    drafting.remember("", [1, 2, 3, 4, 5, 6], 3)
    for _ in range(50):
        assert drafting.draft(guesser, "", [1, 2, 3], least_chance=0.0, most=2)
        drafting.learn(guesser, 2, 0)
    assert drafting.draft(guesser, "", [1, 2, 3], least_chance=0.3, most=2) == ()
    assert drafting.draft(guesser, "", [1, 2, 3, 7, 8, 9, 7, 8], least_chance=0.3, most=2) == (9,)


def test_no_more_phrases_are_kept_than_there_may_be() -> None:
    phrases = Phrases(most=3)
    text = [1, 2, 3, 4, 5, 6, 7]
    phrases.learn(text[:6], 3)
    phrases.learn([1, 2, 3, 4], 1)  # seen again
    phrases.learn(text, 1)
    assert phrases.guess([1, 2, 3], 7) == (4,)
    assert phrases.guess([2, 3, 4], 7) == (), "not seen for longest"
    assert phrases.guess([3, 4, 5], 7) == (6, 7)
    drafting = Drafting()
    for tenant in range(100):
        drafting.remember(str(tenant), text, 4)
    kept = [
        str(tenant) for tenant in range(100) if drafting.draft(Guesser(), str(tenant), text[:3], least_chance=0, most=1)
    ]
    assert kept == [str(tenant) for tenant in range(68, 100)]
