"""Tools for models whose chat template has no place for them: told in words, in the messages. Pure.

The functions stand at the end of the system message; calls and their results become text in the assistant's and the
user's turns, in the form that `CallFormat.HERMES` reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from molink_gateway.tools import ToolPlan
from molink_gateway.turns import Turn

_MAY = """
To call a function, answer with its name and its arguments in this form, and wait for the result:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>"""
_SEVERAL = "\nFor several calls, write several of these blocks."
_NEEDLESS = "\nIf no function is of use, answer in your own words."
_MUST_ONE = """
Answer with one call of a function and nothing else, in this form:
{"name": "...", "arguments": {...}}"""
_MUST = """
Answer with a list of calls of functions and nothing else, in this form:
[{"name": "...", "arguments": {...}}]"""


def with_tools_in_words(turns: Sequence[Turn], plan: ToolPlan | None) -> list[Turn]:
    """The same conversation without anything that only a template with tools understands."""
    plain = _without_tool_turns(turns)
    if plan is None:
        return plain
    described = _description(plan)
    if plain and plain[0]["role"] == "system":
        system = {**plain[0], "content": f"{plain[0]['content']}\n\n{described}".lstrip()}
        return [system, *plain[1:]]
    return [{"role": "system", "content": described}, *plain]


def _description(plan: ToolPlan) -> str:
    functions = [
        {"name": one.name, "description": one.description or "", "parameters": one.parameters} for one in plan.functions
    ]
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    if plan.is_required:
        how = _MUST if plan.is_parallel else _MUST_ONE
    else:
        how = _MAY + (_SEVERAL if plan.is_parallel else "") + _NEEDLESS
    return f"You can call these functions, each described by a JSON schema:\n{listed}\n{how}"


def _without_tool_turns(turns: Sequence[Turn]) -> list[Turn]:
    plain: list[Turn] = []
    is_behind_result = False
    for turn in turns:
        is_result = turn["role"] == "tool"
        if is_result:
            content = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if is_behind_result:  # results of parallel calls are one turn: many templates want turns to alternate
                plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{content}"}
            else:
                plain.append({"role": "user", "content": content})
        elif turn.get("tool_calls"):
            parts = [turn["content"], *(_call(call) for call in turn["tool_calls"])]
            kept = {name: value for name, value in turn.items() if name != "tool_calls"}
            plain.append(kept | {"content": "\n".join(part for part in parts if part)})
        else:
            plain.append(turn)
        is_behind_result = is_result
    return plain


def _call(call: Turn) -> str:
    function = call["function"]
    shown = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(shown, ensure_ascii=False)}\n</tool_call>"
