"""Log probabilities of a prompt: collected out of order and more than once, told in two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from molink_common.messages import PromptLogprobs, TokenLogprob
from molink_gateway.options import sampling_options
from molink_gateway.prompt_logprobs import PromptInbox, joined, offsets_in_bytes, offsets_in_ids, offsets_in_text
from molink_gateway.requests import CompletionRequest
from molink_gateway.tokenizer import Tokenizer, TokenText, load_tokenizer
from tests.integration.test_gateway_pool import WORDS, make_tokenizer

PROMPT = [7, 8, 9, 8]


def text_of(token: int) -> TokenText:
    return TokenText(f"<{token}>", b"")


def part(start: int, logprobs: Sequence[float], *, likeliest: int = 2) -> PromptLogprobs:
    """The token at place p is the second likeliest; the likeliest is 50 + p."""
    places = range(start, start + len(logprobs))
    return PromptLogprobs(
        sequence="a" * 16,
        start=start,
        logprobs=tuple(logprobs),
        ranks=(2,) * len(logprobs),
        likeliest=tuple(
            (
                TokenLogprob(token=50 + place, logprob=-0.25),
                TokenLogprob(token=PROMPT[place] if place < len(PROMPT) else 0, logprob=logprob),
            )[:likeliest]
            for place, logprob in zip(places, logprobs, strict=True)
        ),
    )


def full(*, likeliest: int = 2) -> PromptInbox:
    inbox = PromptInbox(PROMPT)
    inbox.put(part(1, [-1.0, -2.0, -3.0], likeliest=likeliest))
    return inbox


def test_places_come_in_any_order_and_count_once() -> None:
    inbox = PromptInbox(PROMPT)
    assert not inbox.is_complete
    inbox.put(part(3, [-3.0, -9.0, -9.0]))  # two of them lie behind the prompt
    inbox.put(part(1, [-1.0]))
    assert not inbox.is_complete
    inbox.put(part(1, [-7.0, -2.0, -7.0]))
    assert inbox.is_complete
    told = inbox.as_openai(likeliest=0, offsets=[0, 3, 6, 9], text_of=text_of)
    assert told["token_logprobs"] == [None, -1.0, -2.0, -3.0]


def test_a_prompt_of_one_token_has_nothing_to_wait_for() -> None:
    inbox = PromptInbox([7])
    assert inbox.is_complete
    assert inbox.as_vllm(likeliest=3, text_of=text_of) == [None]
    assert inbox.as_openai(likeliest=3, offsets=[0], text_of=text_of) == {
        "tokens": ["<7>"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }


@pytest.mark.parametrize(("likeliest", "second"), [(0, {"<8>": -1.0}), (1, {"<51>": -0.25, "<8>": -1.0})])
def test_openai_tells_the_likeliest_and_the_token_itself(likeliest: int, second: dict[str, float]) -> None:
    told = full().as_openai(likeliest=likeliest, offsets=[0, 3, 6, 9], text_of=text_of)
    assert told["tokens"] == ["<7>", "<8>", "<9>", "<8>"]
    assert told["top_logprobs"][:2] == [None, second]


def test_of_tokens_that_read_alike_the_likeliest_counts() -> None:
    told = full().as_openai(likeliest=2, offsets=[0] * 4, text_of=lambda _: TokenText("?", b""))
    assert told["top_logprobs"] == [None, {"?": -0.25}, {"?": -0.25}, {"?": -0.25}]


def test_vllm_tells_tokens_by_id_with_their_ranks() -> None:
    assert full().as_vllm(likeliest=1, text_of=text_of)[:2] == [
        None,
        {
            "8": {"logprob": -1.0, "rank": 2, "decoded_token": "<8>"},
            "51": {"logprob": -0.25, "rank": 1, "decoded_token": "<51>"},
        },
    ]
    told = full(likeliest=0).as_vllm(likeliest=0, text_of=text_of)
    assert [list(one or ()) for one in told] == [[], ["8"], ["9"], ["8"]]


def test_what_cannot_be_is_told_as_a_number() -> None:
    inbox = PromptInbox([7, 8])
    inbox.put(PromptLogprobs(sequence="a" * 16, start=1, logprobs=(-3.4e38,)))
    assert inbox.as_openai(likeliest=5, offsets=[0, 3], text_of=text_of)["token_logprobs"] == [None, -9999.0]


def test_the_answer_follows_the_prompt() -> None:
    prompt = full().as_openai(likeliest=0, offsets=[0, 3, 6, 9], text_of=text_of)
    answer: dict[str, list[Any]] = {
        "tokens": ["x"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"x": -0.5}],
        "text_offset": [0],
    }
    both = joined(prompt, answer, num_echoed=12)
    assert both["tokens"] == ["<7>", "<8>", "<9>", "<8>", "x"]
    assert both["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.5]
    assert both["text_offset"] == [0, 3, 6, 9, 12]
    assert joined(prompt, None, num_echoed=12) == prompt


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    make_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [WORDS, "日本語 and 😀😀 ä", "  two  spaces\n\nand lines ", "x"])
def test_offsets_cut_the_text_where_tokens_begin(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=True)
    by_text = offsets_in_text(tokenizer.spans(text, add_special_tokens=True))
    assert offsets_in_bytes([tokenizer.bytes_in_text(token) for token in tokens], text) == by_text
    by_ids = offsets_in_ids(tokenizer.detokenizer(()), tokens, len(text))
    assert all(coarse <= fine for coarse, fine in zip(by_ids, by_text, strict=True))
    for number, token in enumerate(tokens):
        end = by_text[number + 1] if number + 1 < len(tokens) else len(text)
        own = tokenizer.text_of(token).text
        if "\ufffd" not in own:
            assert text[by_text[number] : end] == own


def test_a_special_token_has_its_place_in_a_text_and_none_in_ids(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>Hello<|im_end|>"
    tokens = tokenizer.encode(text, add_special_tokens=True)
    assert tokens[0] == 1
    by_text = offsets_in_text(tokenizer.spans(text, add_special_tokens=True))
    assert (by_text[0], by_text[1], by_text[-1]) == (0, len("<|im_start|>"), text.index("<|im_end|>"))
    by_ids = offsets_in_ids(tokenizer.detokenizer(()), tokens, len("Hello"))
    assert offsets_in_bytes([tokenizer.bytes_in_text(token) for token in tokens], "Hello") == by_ids
    assert (by_ids[0], by_ids[1], by_ids[-1]) == (0, 0, len("Hello"))


@pytest.mark.parametrize(
    ("pieces", "text", "offsets"),
    [
        ([b" the", b" cat"], "the cat", [0, 3]),  # a decoder has stripped the front
        ([b"\xe6\x97", b"\xa5\xe6\x9c\xac", b"!"], "日本!", [0, 0, 2]),
        ([b"", b"a", b"", b"b"], "ab", [0, 0, 1, 1]),
        ([b"\xff"], "\ufffd", None),
        ([b"##ing"], "ing!", None),
    ],
)
def test_offsets_by_bytes(pieces: list[bytes], text: str, offsets: list[int] | None) -> None:
    assert offsets_in_bytes(pieces, text) == offsets


def test_spans_that_leave_out_spaces_or_have_no_text() -> None:
    # a token that begins the text and one that ends it stand for nothing in it; the second word's space is left out
    assert offsets_in_text([(0, 0), (0, 3), (4, 7), (7, 8), (7, 8), (0, 0)]) == [0, 0, 3, 7, 7, 8]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"echo": True, "logprobs": 1}, [1, None]),
        ({"logprobs": 1}, [None, None]),
        ({"echo": True}, [None, None]),
        ({"prompt_logprobs": 0}, [0, None]),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 3}, [3, None]),
    ],
)
def test_one_choice_has_the_prompt_told(fields: dict[str, Any], wanted: list[int | None]) -> None:
    request = CompletionRequest(model="m", prompt=["x"], n=2, max_tokens=0, **fields)
    options = sampling_options(
        request,
        num_prompt_tokens=5,
        context_length=100,
        vocabulary_size=50,
        seed=1,
        default_tokens=None,
        prompt_field="prompt",
    )
    assert [one.prompt_logprobs for one in options] == wanted
    assert [one.max_tokens for one in options] == [1, 1]  # the one that nobody reads
