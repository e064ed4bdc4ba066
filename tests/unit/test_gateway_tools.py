"""The tools of a request: what may be called, how a model is told, and what is forced."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from molink_gateway.answer_form import AnswerForm, form_of
from molink_gateway.api_errors import ApiError
from molink_gateway.call_formats import CallFormat
from molink_gateway.requests import ChatRequest, parse_chat
from molink_gateway.tool_prompt import with_tools_in_words
from molink_gateway.turns import Turn

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"]}
CITY["$defs"] = {"City": {"type": "string", "maxLength": 20}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
BYTES = LLTokenizer("byte")


def body(**fields: Any) -> bytes:
    fields.setdefault("messages", [{"role": "user", "content": "Hello"}])
    return json.dumps({"model": "demo", **fields}).encode()


def request(**fields: Any) -> ChatRequest:
    return parse_chat(body(tools=[WEATHER, TIME], **fields))


class Model:
    """What `form_of` must know of a model."""

    def __init__(self, call_format: CallFormat | None, *tokens: str) -> None:
        self.call_format = call_format
        self._tokens = tokens

    def has_token(self, text: str) -> bool:
        return text in self._tokens

    def unwritable(self, text: str) -> str | None:
        return "ñ" if "ñ" in text else None


def form(asked: ChatRequest, model: Model | None = None) -> AnswerForm:
    return form_of(asked, asked.tool_plan(), model or Model(None))


def allows(grammar: str | None, text: str) -> bool:
    """Whether `text` may be a whole answer."""
    assert grammar is not None
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "names", "is_required", "is_parallel"),
    [
        ({}, ("weather", "time"), False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ("weather", "time"), False, False),
        ({"tool_choice": "required"}, ("weather", "time"), True, True),
        ({"tool_choice": "any"}, ("weather", "time"), True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, ("time",), True, False),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}}},
            ("time",),
            True,
            True,
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TIME, WEATHER]}}},
            ("weather", "time"),
            False,
            True,
        ),
    ],
)
def test_what_may_be_called(
    fields: dict[str, Any], names: tuple[str, ...], is_required: bool, is_parallel: bool
) -> None:
    plan = request(**fields).tool_plan()
    assert plan is not None
    assert (plan.names, plan.is_required, plan.is_parallel) == (names, is_required, is_parallel)


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}])
def test_nothing_may_be_called(fields: dict[str, Any]) -> None:
    assert parse_chat(body(**{"tools": [TIME], **fields})).tool_plan() is None


@pytest.mark.parametrize(
    ("fields", "message", "param", "code"),
    [
        ({"tools": {}}, "`tools` must be a list of tools.", "tools", None),
        ({"tools": [TIME] * 129}, "`tools` must hold at most 128 tools, but holds 129.", "tools", None),
        (
            {"tools": [{"type": "function"}]},
            "`tools[0].function` is required.",
            "tools[0].function",
            "missing_required_parameter",
        ),
        (
            {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
            "`tools[0].type` must be 'function', but it is 'custom'; other tools are not supported.",
            "tools[0].type",
            "unsupported",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "two words"}}]},
            "`tools[0].function.name` must be a name of 1 to 64 letters, digits, underscores, dots and dashes.",
            "tools[0].function.name",
            None,
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "`tools[0].function.parameters` must be a JSON schema with `type` 'object', but it is 'string'.",
            "tools[0].function.parameters",
            None,
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            '`tools[0].function.parameters` must be a JSON schema of an object, like {"type": "object", "properties": '
            "{…}}.",
            "tools[0].function.parameters",
            None,
        ),
        (
            {"tools": [TIME, TIME]},
            "`tools[1].function.name` is 'time', which an earlier tool has. Names must differ.",
            "tools[1].function.name",
            None,
        ),
        (
            {"tool_choice": "required"},
            "`tool_choice` asks for a call, but `tools` holds none.",
            "tool_choice",
            None,
        ),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "dance"}}},
            "`tool_choice` names 'dance', which is not one of `tools`: 'time'.",
            "tool_choice",
            None,
        ),
        (
            {"tools": [TIME], "tool_choice": "sometimes"},
            '`tool_choice` must be \'none\', \'auto\', \'required\', {"type": "function", "function": {"name": …}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}.',
            "tool_choice",
            None,
        ),
        (
            {"functions": [{"name": "f"}]},
            "`functions` is not supported by this server. Use `tools`, which came in its place.",
            "functions",
            "unsupported",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            '`messages[0].tool_calls` must hold calls like {"id": …, "type": "function", "function": {"name": …, '
            '"arguments": "{…}"}}, but call 0 is none.',
            "messages[0].tool_calls",
            None,
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
            "`messages[0]` has `tool_calls`, which only an assistant's may have (role 'user').",
            "messages[0]",
            None,
        ),
    ],
)
def test_what_is_wrong_with_tools(fields: dict[str, Any], message: str, param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(body(**fields))
    assert caught.value.status == 400
    assert caught.value.body() == {
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    }


def test_a_schema_that_cannot_be_followed_is_named() -> None:
    def with_parameters(parameters: dict[str, Any], *, strict: bool | None = None) -> ChatRequest:
        function = {"name": "f", "parameters": parameters, "strict": strict}
        return parse_chat(body(tools=[TIME, {"type": "function", "function": function}], tool_choice="required"))

    wrong = with_parameters({"type": "object", "properties": {"x": {"type": "nothing"}}})
    with pytest.raises(ApiError) as caught:
        form(wrong)
    assert caught.value.param == "tools[1].function.parameters"
    half_known = {"type": "object", "properties": {"x": {"not": {"type": "string"}}}}
    assert form(with_parameters(half_known)).grammar is not None
    with pytest.raises(ApiError) as caught:
        form(with_parameters(half_known, strict=True))
    assert (caught.value.param, caught.value.code) == ("tools[1].function.parameters", "unsupported")


def test_required_calls_are_forced() -> None:
    wanted = form(request(tool_choice="required"))
    assert wanted.calls is not None
    assert (wanted.calls.form, wanted.calls.functions) == (CallFormat.BARE, ("weather", "time"))
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    assert allows(wanted.grammar, f"[{call}]")
    assert allows(wanted.grammar, f'[{call}, {{"name": "time", "arguments": {{}}}}]')
    for other in (
        "[]",
        "Hello",
        call,
        '[{"name": "dance", "arguments": {}}]',
        '[{"name": "weather", "arguments": {}}]',
    ):
        assert not allows(wanted.grammar, other)
    one = form(request(tool_choice={"type": "function", "function": {"name": "weather"}}))
    assert allows(one.grammar, call)
    assert not allows(one.grammar, f"[{call}]")
    assert not allows(one.grammar, '{"name": "time", "arguments": {}}')


def test_without_force_there_is_no_grammar() -> None:
    wanted = form(request())
    assert wanted.grammar is None
    assert wanted.calls is not None
    assert wanted.calls.form is CallFormat.HERMES
    assert form(request(), Model(CallFormat.MISTRAL)).calls == wanted.calls.model_copy(
        update={"form": CallFormat.MISTRAL, "has_short_ids": True}
    )
    assert form(request(tool_choice="none")) == AnswerForm()


def test_strict_functions_are_held_to_wherever_the_marker_is_text() -> None:
    strict = {"type": "function", "function": {"name": "f", "parameters": CITY, "strict": True}}
    asked = parse_chat(body(tools=[strict]))
    grammar = form(asked).grammar
    assert allows(grammar, "No need of calls, {} < >.")
    assert allows(grammar, 'So: <tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call> Done.')
    assert not allows(grammar, 'So: <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    assert not allows(grammar, "So: <tool_call>\nnothing")
    assert form(asked, Model(CallFormat.HERMES, "<tool_call>")).grammar is None


@pytest.mark.parametrize(
    ("call_format", "call"),
    [
        (None, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'),
        (CallFormat.LLAMA, '<|python_tag|>{"name": "time", "parameters": {}}'),
        (CallFormat.MISTRAL, '[TOOL_CALLS][{"name": "time", "arguments": {}}]'),
    ],
)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_a_form_of_the_answer_leaves_room_for_calls(
    call_format: CallFormat | None, call: str, is_parallel: bool
) -> None:
    asked = request(response_format={"type": "json_object"}, parallel_tool_calls=is_parallel)
    grammar = form(asked, Model(call_format)).grammar
    assert allows(grammar, '{"answer": 42}')
    assert allows(grammar, call)
    assert not allows(grammar, "Hello")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "[0-9"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {"type": "object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ],
)
def test_forms_that_cannot_be_followed(fields: dict[str, Any], param: str) -> None:
    asked = parse_chat(body(**fields))
    with pytest.raises(ApiError) as caught:
        form(asked)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "structured_outputs" not in caught.value.message or param.startswith("structured_outputs")


def test_older_names_of_forms_are_taken() -> None:
    assert allows(form(parse_chat(body(guided_choice=["yes", "no"]))).grammar, "yes")
    assert not allows(form(parse_chat(body(guided_regex="[0-9]+"))).grammar, "x")


CALL: Turn = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris"}},
}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]


def test_turns_with_calls_as_templates_read_them() -> None:
    turns = request(messages=CONVERSATION).turns()
    assert turns[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            CALL,
            {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": {}}},
        ],
    }
    assert turns[2] == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


def test_arguments_that_are_no_object_stay_as_they_were_written() -> None:
    for written in ('{"city": "Pa', "[1]", "5"):
        call = {"function": {"name": "weather", "arguments": written}}
        (turn,) = request(messages=[{"role": "assistant", "tool_calls": [call]}]).turns()
        assert turn["tool_calls"][0]["function"]["arguments"] == written


def test_tools_in_words() -> None:
    asked = request(messages=[{"role": "system", "content": "Be short."}, *CONVERSATION])
    system, *rest = with_tools_in_words(asked.turns(), asked.tool_plan())
    assert system["role"] == "system"
    assert system["content"].startswith("Be short.\n\n")
    described = json.dumps({"name": "weather", "description": "Of a city.", "parameters": CITY})
    assert described in system["content"].splitlines()
    assert "<tool_call>" in system["content"]
    assert rest == [
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>",
        },
    ]


def test_words_fit_what_is_forced() -> None:
    for choice, shown in (
        ("required", "list of calls"),
        ({"type": "function", "function": {"name": "time"}}, "one call"),
    ):
        asked = request(tool_choice=choice)
        (system, _) = with_tools_in_words(asked.turns(), asked.tool_plan())
        assert shown in system["content"]
        assert "<tool_call>" not in system["content"]


def test_without_tools_the_conversation_stays() -> None:
    turns = parse_chat(body()).turns()
    assert with_tools_in_words(turns, None) == turns


@pytest.mark.parametrize("fields", [{"structured_outputs": {"choice": ["sí", "mañana"]}}, {"guided_choice": ["ñ"]}])
def test_a_choice_that_the_model_cannot_write_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=r"the character '\\xf1', for which this model has no tokens") as refused:
        form_of(parse_chat(body(**fields)), None, Model(None))
    (param,) = fields
    assert refused.value.param == ("structured_outputs.choice" if param == "structured_outputs" else param)
