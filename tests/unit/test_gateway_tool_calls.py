"""A model's text, cut into what it says and what it calls, whole and in pieces."""

from __future__ import annotations

import json

import pytest

from molink_gateway.call_formats import CallFormat, format_of
from molink_gateway.tool_calls import CallReader

Calls = list[tuple[str, str]]
FUNCTIONS = ("weather", "time")


def read(form: CallFormat, text: str, *, is_parallel: bool = True, size: int = 1) -> tuple[str, Calls, bool]:
    """Text, calls and whether the one call that may be made is done."""
    reader = CallReader(form, FUNCTIONS, is_parallel=is_parallel)
    said = [reader.feed(text[start : start + size]) for start in range(0, len(text), size)]
    said.append(reader.flush())
    calls: dict[int, tuple[str, str]] = {}
    for delta in (delta for one in said for delta in one.calls):
        name, arguments = calls.get(delta.index, ("", ""))
        assert (delta.name is None) == (delta.index in calls)
        calls[delta.index] = (name + (delta.name or ""), arguments + delta.arguments)
    assert sorted(calls) == list(range(len(calls)))
    assert reader.has_calls == bool(calls)
    return "".join(one.text for one in said), list(calls.values()), reader.is_done


WEATHER = ("weather", '{"city": "Paris"}')
TIME = ("time", "{}")
CASES: list[tuple[CallFormat, str, str, Calls]] = [
    (CallFormat.HERMES, "Hello.", "Hello.", []),
    (CallFormat.HERMES, " Hello. \n", " Hello. \n", []),
    (CallFormat.HERMES, "a < b <tool and <tool_cal", "a < b <tool and <tool_cal", []),
    (
        CallFormat.HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [WEATHER],
    ),
    (
        CallFormat.HERMES,
        'Let me look.\n\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "time"}</tool_call>\n That is all.',
        "Let me look.That is all.",
        [WEATHER, TIME],
    ),
    (CallFormat.HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [TIME]),
    (CallFormat.HERMES, '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [TIME]),
    (CallFormat.HERMES, '<tool_call>{"name": "time", "arguments": ""}</tool_call>', "", [TIME]),
    (
        CallFormat.HERMES,
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        "",
        [WEATHER],
    ),
    (
        CallFormat.HERMES,
        '<tool_call>{"id": 7, "type": "function", "name": "weather", "arguments": {"city": "Paris"}}}</tool_call>',
        "",
        [WEATHER],
    ),
    (
        CallFormat.HERMES,
        '<tool_call>{"name": "weather", "arguments": {"a": "}</tool_call>\\"", "b": [{"c": 1}]}}</tool_call>',
        "",
        [("weather", '{"a": "}</tool_call>\\"", "b": [{"c": 1}]}')],
    ),
    # what is no call is text, to the letter
    (CallFormat.HERMES, '<tool_call>{"name": "unknown"}</tool_call>', '<tool_call>{"name": "unknown"}</tool_call>', []),
    (CallFormat.HERMES, "<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
    (CallFormat.HERMES, '<tool_call>{"name": 5}', '<tool_call>{"name": 5}', []),
    (CallFormat.HERMES, '<tool_call>{"name": "time", "arguments": 1', '<tool_call>{"name": "time", "arguments": 1', []),
    (CallFormat.HERMES, '<tool_call>{"arguments": {}}', '<tool_call>{"arguments": {}}', []),
    (CallFormat.HERMES, '<tool_call>{"name": "time"', '<tool_call>{"name": "time"', []),
    (CallFormat.HERMES, '<tool_call> \n', "<tool_call> \n", []),
    (CallFormat.HERMES, '<tool_call><tool_call>{"name": "time"}', "<tool_call>", [TIME]),
    # a call that was not finished stays one
    (CallFormat.HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Pa', "", [("weather", '{"city": "Pa')]),
    (CallFormat.HERMES, '<tool_call>{"name": "time", "arguments": {} <b', "<b", [TIME]),
    (CallFormat.LLAMA, '{"name": "weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
    (CallFormat.LLAMA, '\n<|python_tag|>{"type": "function", "name": "time", "parameters": {}}', "", [TIME]),
    (
        CallFormat.LLAMA,
        '{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "time", "parameters": {}}',
        "",
        [WEATHER, TIME],
    ),
    (CallFormat.LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (CallFormat.LLAMA, ' {"name": "Bob", "age": 3} ', ' {"name": "Bob", "age": 3} ', []),
    (CallFormat.LLAMA, 'Use {"name": "time", "parameters": {}}', 'Use {"name": "time", "parameters": {}}', []),
    (CallFormat.LLAMA, "[1, 2]", "[1, 2]", []),
    (
        CallFormat.MISTRAL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time", "arguments": {}}]',
        "",
        [WEATHER, TIME],
    ),
    (CallFormat.MISTRAL, 'Well.[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]time[ARGS]{}', "Well.", [WEATHER, TIME]),
    (CallFormat.MISTRAL, "[TOOL_CALLS]dance{}", "[TOOL_CALLS]dance{}", []),
    (CallFormat.MISTRAL, '[TOOL] {"name": "time"}', '[TOOL] {"name": "time"}', []),
    (
        CallFormat.BARE,
        '[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time", "arguments": {}}]',
        "",
        [WEATHER, TIME],
    ),
    (CallFormat.BARE, '{"name": "time", "arguments": {}}', "", [TIME]),
    (CallFormat.BARE, "I will not.", "I will not.", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "told", "calls"), CASES)
def test_every_way_of_calling(form: CallFormat, text: str, told: str, calls: Calls) -> None:
    for size in (1, 2, 3, 7, len(text)):
        assert read(form, text, size=size)[:2] == (told, calls)


def test_arguments_are_told_as_they_come() -> None:
    reader = CallReader(CallFormat.HERMES, FUNCTIONS)
    assert reader.feed('<tool_call>{"name": "weather", "arg').calls == ()
    (delta,) = reader.feed('uments": {"ci').calls
    assert (delta.index, delta.name, delta.arguments) == (0, "weather", '{"ci')
    (delta,) = reader.feed('ty": "').calls
    assert (delta.index, delta.name, delta.arguments) == (0, None, 'ty": "')


def test_only_one_call_is_made_where_only_one_may_be() -> None:
    text = '<tool_call>{"name": "time"}</tool_call><tool_call>{"name": "time"}</tool_call> and more'
    for size in (1, 5, len(text)):
        assert read(CallFormat.HERMES, text, is_parallel=False, size=size) == ("", [TIME], True)
    assert not read(CallFormat.HERMES, '<tool_call>{"name": "time", ', is_parallel=False)[2]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", None),
        ("{{ messages }} <tool_call>", None),
        ("{% if tools %}<tool_call>{% endif %}", CallFormat.HERMES),
        ("{% if tools %}<tool_call><function=name>{% endif %}", None),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", CallFormat.MISTRAL),
        ("{% if tools %}<|start_header_id|>ipython{% endif %}", CallFormat.LLAMA),
        ("{% if tools %}something else{% endif %}", None),
    ],
)
def test_the_way_is_known_by_the_template(template: str, form: CallFormat | None) -> None:
    assert format_of(template) is form


def test_a_long_text_of_false_starts_is_read_in_one_go() -> None:
    text = '<tool_call>{"name": "' * 20_000
    assert read(CallFormat.HERMES, text, size=len(text))[0] == text
    deep = json.dumps({"name": "x"})[:-2] + "{" * 100_000
    assert read(CallFormat.BARE, deep, size=len(deep))[0] == deep
