"""Where a model's text is cut makes no difference to its calls, and what is no call is told to the letter."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as some

from molink_gateway.call_formats import CallFormat
from molink_gateway.tool_calls import CallReader

PARTS = (
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "}", "[", "]", ",", ";", ":", " ", "\n",
    '"', "\\", '"name"', '"arguments"', '"parameters"', ': "f"', ': {"a": "b"}', "null", "1", "f", "[ARGS]", "text",
    '{"name": "f", "arguments": {"x": [1, "}"]}}', '{"name": "f", "parameters": {}}', '{"name": "g"}', '"{\\"a\\": 1}"',
)  # fmt: skip
texts = some.lists(some.sampled_from(PARTS) | some.text(max_size=3), max_size=14).map("".join)


def read(form: CallFormat, pieces: list[str], *, is_parallel: bool) -> tuple[str, list[tuple[str | None, str]], bool]:
    reader = CallReader(form, ["f"], is_parallel=is_parallel)
    said = [reader.feed(piece) for piece in pieces]
    said.append(reader.flush())
    calls: list[tuple[str | None, str]] = []
    for delta in (delta for one in said for delta in one.calls):
        if delta.index == len(calls):
            assert delta.name == "f"
            calls.append((delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1
            assert delta.name is None
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return "".join(one.text for one in said), calls, reader.is_done


@given(form=some.sampled_from(CallFormat), text=texts, cuts=some.lists(some.integers(0, 200)), parallel=some.booleans())
@example(form=CallFormat.HERMES, text='<tool_call>{"name": "f", "arguments": {} }x', cuts=[13], parallel=True)
def test_cuts_make_no_difference(form: CallFormat, text: str, cuts: list[int], parallel: bool) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    whole = read(form, [text], is_parallel=parallel)
    assert read(form, pieces, is_parallel=parallel) == whole
    assert read(form, list(text), is_parallel=parallel) == whole
    told, calls, _ = whole
    if not calls:
        assert told == text
    if not parallel:
        assert len(calls) <= 1
