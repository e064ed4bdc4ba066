"""Stop strings and detokenizing against oracles that see the whole text at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from molink_gateway.detokenizer import Detokenizer
from molink_gateway.stop_strings import StopStrings

letters = st.text(alphabet="ab", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def naive_cut(text: str, stops: Sequence[str]) -> int | None:
    """Where the answer ends, one character at a time."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending))
    return None


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(letters, stop_lists, st.lists(st.integers(0, 40)))
def test_stop_strings_agree_with_the_naive_oracle(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(stops)
    told = ""
    for piece in pieces_of(text, cuts):
        told += matcher.feed(piece)
        cut = naive_cut(text, stops)
        assert text.startswith(told)
        assert cut is None or len(told) <= cut
        if matcher.is_met:
            break
    cut = naive_cut(text, stops)
    assert matcher.is_met == (cut is not None)
    assert told + matcher.flush() == (text if cut is None else text[:cut])


@given(letters, stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    matcher.feed(text)
    if not matcher.is_met and matcher.held:
        assert any(stop.startswith(matcher.held) and stop != matcher.held for stop in stops)


def decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@given(st.text(max_size=30), st.text(max_size=5))
def test_text_in_single_bytes_comes_out_whole(text: str, context: str) -> None:
    detokenizer = Detokenizer(decode_bytes, lambda _: False, list(context.encode())[-4:] if context.isascii() else [])
    told = "".join(detokenizer.feed(byte) for byte in text.encode())
    assert told + detokenizer.flush() == text


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_are_shown_as_the_decoder_shows_them(data: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes, lambda _: False)
    told = "".join(detokenizer.feed(byte) for byte in data)
    assert told + detokenizer.flush() == decode_bytes(data)


@given(st.lists(st.sampled_from([0xFF, 0xE6, 0x61]), max_size=300))
def test_nothing_is_held_back_for_ever(data: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes, lambda _: False)
    told = ""
    for byte in data:
        told += detokenizer.feed(byte)
    assert len(data) - len(told) < 100


@given(st.lists(st.sampled_from(["▁the", "▁a", "s", "▁", "x"]), min_size=1, max_size=20), st.booleans())
def test_words_keep_the_space_that_the_decoder_strips_at_the_start(words: list[str], has_context: bool) -> None:
    def decode(tokens: Sequence[int]) -> str:
        return "".join(names[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    names = ["▁before", *words]
    detokenizer = Detokenizer(decode, lambda _: False, [0] if has_context else [])
    told = "".join(detokenizer.feed(number) for number in range(1, len(names)))
    told += detokenizer.flush()
    whole = "".join(words).replace("▁", " ")
    assert told == (whole if has_context else whole.removeprefix(" "))


def test_special_tokens_are_no_context() -> None:
    def decode(tokens: Sequence[int]) -> str:
        return "".join(" word" for _ in tokens).removeprefix(" ")

    detokenizer = Detokenizer(decode, lambda token: token == 9)
    assert [detokenizer.feed(token) for token in (9, 1, 9, 1)] == ["", "word", "", " word"]
