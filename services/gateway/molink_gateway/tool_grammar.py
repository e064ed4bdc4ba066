"""Grammars that make a model's calls valid: where a call is required, and where an answer has a form of its own.

Arguments follow the function's schema: to the letter where it is `strict`, otherwise as far as a grammar can. Pure;
takes as long as `grammar.grammar_of`.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from molink_common.sampling import MAX_GRAMMAR_CHARACTERS
from molink_gateway.api_errors import bad_request
from molink_gateway.call_formats import CallFormat
from molink_gateway.grammar import compiler_says, json_schema_grammar, unchecked_json_schema_grammar
from molink_gateway.tools import Function, ToolPlan

MOST_FORCED_CALLS = 16
"""In one answer: a small model may find no end otherwise."""

_MOST_BLAMED = 16
"""Functions that are looked at one by one when all together make no grammar: each takes its time."""

_FORCED = """start: {calls}
"""
_MIXED = """start: {calls} | @answer
"""
_LAZY = """start: tag* REST
tag: head call "\\n</tool_call>"
head[lazy]: REST "<tool_call>"
REST: /(.|\\n)*/
"""
_SEVERAL = {
    CallFormat.BARE: '"[" call (", " call){{0,{more}}} "]"',
    CallFormat.HERMES: 'block ("\\n" block){{0,{more}}}',
    CallFormat.LLAMA: '"<|python_tag|>" call ("; " call){{0,{more}}}',
    CallFormat.MISTRAL: '"[TOOL_CALLS][" call (", " call){{0,{more}}} "]"',
}
_ONE = {
    CallFormat.BARE: "call",
    CallFormat.HERMES: "block",
    CallFormat.LLAMA: '"<|python_tag|>" call',
    CallFormat.MISTRAL: '"[TOOL_CALLS][" call "]"',
}
_BLOCK = 'block: "<tool_call>\\n" call "\\n</tool_call>"\n'


def required_calls(plan: ToolPlan) -> str:
    """The grammar of an answer that is nothing but calls, as `CallFormat.BARE` reads it.

    Raises:
        ApiError: 400, a schema is not one that a grammar can follow.
    """
    return _grammar(_FORCED.format(calls=_calls(plan, CallFormat.BARE)), plan, CallFormat.BARE)


def calls_or_answer(plan: ToolPlan, form: CallFormat, answer: str) -> str:
    """The grammar of an answer that is either calls in the model's form, or follows the grammar `answer`.

    Raises:
        ApiError: as `required_calls`.
    """
    block = _BLOCK if form is CallFormat.HERMES else ""
    return _grammar(_MIXED.format(calls=_calls(plan, form)) + block, plan, form, answer)


def calls_in_text(plan: ToolPlan) -> str:
    """The grammar of a text in which every call, as `CallFormat.HERMES` reads them, is valid.

    Raises:
        ApiError: as `required_calls`.
    """
    return _grammar(_LAZY, plan, CallFormat.HERMES, line='"\\n" ')


def _calls(plan: ToolPlan, form: CallFormat) -> str:
    return _SEVERAL[form].format(more=MOST_FORCED_CALLS - 1) if plan.is_parallel else _ONE[form]


def _grammar(start: str, plan: ToolPlan, form: CallFormat, answer: str | None = None, *, line: str = "") -> str:
    key = "parameters" if form is CallFormat.LLAMA else "arguments"
    lark = start + "call: " + " | ".join(f"call_{place}" for place in range(len(plan.functions))) + "\n"
    parts: list[dict[str, Any]] = []
    schemas = _schemas(plan)
    for place, (function, (param, schema)) in enumerate(zip(plan.functions, schemas, strict=True)):
        begin = json.dumps(f'{{"name": "{function.name}", "{key}": ')
        lark += f'call_{place}: {line}{begin} @arguments_{place} "}}"\n'
        arguments = unchecked_json_schema_grammar(schema, param=param, strict=bool(function.strict))
        parts.append(_named(f"arguments_{place}", arguments))
    if answer is not None:
        parts.append(_named("answer", answer))
    text = orjson.dumps({"grammars": [{"name": "calls", "lark_grammar": lark}, *parts]}).decode()
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise bad_request(
            f"`tools` is too large for a grammar: {len(text)} characters, where at most {MAX_GRAMMAR_CHARACTERS} are "
            "possible. Offer fewer tools, or let the model choose freely.",
            param="tools",
        )
    why = compiler_says(text)
    if why is not None:
        for function, (param, schema) in zip(plan.functions[:_MOST_BLAMED], schemas, strict=False):
            json_schema_grammar(schema, param=param, strict=bool(function.strict))  # says which one it is, and why
        raise bad_request(f"`tools` together make no grammar that can be followed: {why}", param="tools")
    return text


def _schemas(plan: ToolPlan) -> list[tuple[str, dict[str, Any]]]:
    """Of each function: the field, and the schema that its arguments follow."""
    return [
        (f"tools[{place}].function.parameters", _arguments(function))
        for place, function in zip(plan.places, plan.functions, strict=True)
    ]


def _arguments(function: Function) -> dict[str, Any]:
    schema = {**function.parameters}
    if "$ref" not in schema:
        schema.setdefault("type", "object")
    return schema


def _named(name: str, grammar: str) -> dict[str, Any]:
    (first,) = orjson.loads(grammar)["grammars"]
    return {**first, "name": name}
