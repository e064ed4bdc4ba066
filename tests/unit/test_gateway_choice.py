"""An answer that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence

from molink_common.messages import FinishReason, TokenEvent, TokenLogprob
from molink_gateway.call_formats import CallFormat
from molink_gateway.choice import SMALLEST_LOGPROB, Choice, Delta
from molink_gateway.detokenizer import Detokenizer
from molink_gateway.stop_strings import StopStrings
from molink_gateway.tokenizer import TokenText
from molink_gateway.tool_calls import CallDelta, CallReader

PIECES = {10: b"one", 11: b" two", 12: b" \xc3", 13: b"\xa4", 14: b"\xff", 2: b"<end>"}


def decode(tokens: Sequence[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode(errors="replace")


def text_of(token: int) -> TokenText:
    return TokenText(PIECES[token].decode(errors="replace"), PIECES[token])


def choice(*stops: str, has_logprobs: bool = False, keeps_stop: bool = False) -> Choice:
    return Choice(
        Detokenizer(decode, lambda _: False),
        StopStrings(stops, keeps_stop=keeps_stop),
        text_of=text_of,
        eos_token_ids=frozenset({2}),
        has_logprobs=has_logprobs,
    )


def feed(growing: Choice, *tokens: int, finish: FinishReason | None = None, logprob: float = -0.25) -> list[Delta]:
    deltas = []
    for place, token in enumerate(tokens):
        deltas.append(
            growing.feed(
                TokenEvent(
                    sequence="a" * 16,
                    index=growing.num_tokens,
                    token=token,
                    finish=finish if place == len(tokens) - 1 else None,
                    logprob=logprob,
                    top_logprobs=(TokenLogprob(token=token, logprob=logprob),),
                )
            )
        )
    return deltas


def test_end_of_text_is_counted_and_not_shown() -> None:
    growing = choice()
    deltas = feed(growing, 10, 11, 2, finish=FinishReason.STOP)
    assert [delta.text for delta in deltas] == ["one", " two", ""]
    assert growing.finish is FinishReason.STOP
    assert growing.num_tokens == 3
    assert not growing.is_cut_short


def test_end_of_text_that_is_ignored_is_shown() -> None:
    growing = choice()
    assert [delta.text for delta in feed(growing, 2, 10)] == ["<end>", "one"]


def test_a_character_over_two_tokens_comes_whole() -> None:
    assert [delta.text for delta in feed(choice(), 12, 13)] == ["", " ä"]


def test_what_is_left_at_the_end_is_flushed() -> None:
    assert [delta.text for delta in feed(choice("zzz"), 10, 12, finish=FinishReason.LENGTH)] == ["one", " \ufffd"]
    assert [delta.text for delta in feed(choice(" twofold"), 10, 11, finish=FinishReason.LENGTH)] == ["one", " two"]


def test_a_stop_string_over_two_tokens_cuts_the_answer() -> None:
    growing = choice("e t")
    deltas = feed(growing, 10, 11, 10)
    assert "".join(delta.text for delta in deltas) == "on"
    assert growing.finish is FinishReason.STOP
    assert growing.is_cut_short
    assert growing.num_tokens == 2


def test_a_stop_string_with_the_last_token_needs_no_cancellation() -> None:
    growing = choice("two")
    feed(growing, 10, 11, finish=FinishReason.LENGTH)
    assert growing.finish is FinishReason.STOP
    assert not growing.is_cut_short


def test_log_probabilities_wait_for_their_text() -> None:
    growing = choice("e tzzz", has_logprobs=True)
    first, second = feed(growing, 10, 11)
    assert (first.text, [entry.offset for entry in first.logprobs]) == ("on", [0])
    assert (second.text, [entry.token.text for entry in second.logprobs]) == ("e two", [" two"])
    assert second.logprobs[0].offset == 3


def test_log_probabilities_behind_a_stop_string_are_not_told() -> None:
    growing = choice(" two", has_logprobs=True)
    deltas = feed(growing, 10, 11)
    assert [entry.token.text for delta in deltas for entry in delta.logprobs] == ["one"]


def test_an_impossible_token_has_a_number_that_json_can_hold() -> None:
    (delta,) = feed(choice(has_logprobs=True), 10, logprob=float("-inf"))
    assert delta.logprobs[0].logprob == SMALLEST_LOGPROB
    assert delta.logprobs[0].likeliest[0][1] == SMALLEST_LOGPROB


CALLED = {20: b"<tool_call>", 21: b'{"name": "f"', 22: b', "arguments": {"a": ', 23: b"1}}", 24: b"</tool_call>"}
PIECES.update(CALLED)


def calling(*stops: str, is_parallel: bool = True) -> Choice:
    return Choice(
        Detokenizer(decode, lambda _: False),
        StopStrings(stops),
        text_of=text_of,
        eos_token_ids=frozenset({2}),
        has_logprobs=False,
        calls=CallReader(CallFormat.HERMES, ["f"], is_parallel=is_parallel),
    )


def test_text_and_calls_grow_apart() -> None:
    growing = calling()
    deltas = feed(growing, 10, *CALLED, 2, finish=FinishReason.STOP)
    assert [delta.text for delta in deltas] == ["one", "", "", "", "", "", ""]
    assert [call for delta in deltas for call in delta.calls] == [
        CallDelta(0, "f", '{"a": '),
        CallDelta(0, None, "1}"),
    ]
    assert [delta.tokens for delta in deltas] == [(10,), *((token,) for token in CALLED), (2,)]
    assert (deltas[-1].finish, deltas[-1].has_called) == (FinishReason.STOP, True)
    assert not growing.is_cut_short


def test_a_call_that_was_cut_off_is_called_all_the_same() -> None:
    (*_, last) = feed(calling(), 20, 21, 22, finish=FinishReason.LENGTH)
    assert (last.finish, last.has_called) == (FinishReason.LENGTH, True)


def test_what_became_no_call_is_text_at_the_end() -> None:
    (*_, last) = feed(calling(), 20, 21, finish=FinishReason.LENGTH)
    assert (last.text, last.has_called) == ('<tool_call>{"name": "f"', False)


def test_the_one_call_that_may_be_made_ends_the_answer() -> None:
    growing = calling(is_parallel=False)
    deltas = feed(growing, *CALLED)
    assert growing.finish is FinishReason.STOP
    assert growing.is_cut_short
    assert growing.num_tokens == 4
    assert deltas[3].has_called
    assert deltas[4] == Delta()


def test_a_stop_string_may_stay_in_the_answer() -> None:
    for stops, text in ((("e t",), "one t"), (("o", "one"), "o")):
        growing = choice(*stops, keeps_stop=True)
        assert "".join(delta.text for delta in feed(growing, 10, 11)) == text
        assert growing.is_cut_short
