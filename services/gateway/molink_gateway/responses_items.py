"""Items of OpenAI's Responses: what a client may send, in one form, and as messages of a chat. Pure.

Four kinds are known: messages (with text parts), `function_call`, `function_call_output`, and `reasoning`, which is
left out: models here do not read what they once thought. Whatever else is refused by its name.
"""

from __future__ import annotations

from typing import Any

from molink_gateway.request_fields import not_supported, wrong

Item = dict[str, Any]

MAX_ITEMS = 2048
_INPUT_ROLES = ("user", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")


def items_of(value: Any) -> list[Item]:
    """`input` as a list of items in one form; ids are kept where the client gave some.

    Raises:
        PydanticCustomError: it is neither a text nor a list of items that are known.
    """
    if isinstance(value, str):
        return [_message("user", value)]
    if not isinstance(value, list):
        raise wrong("must be a string or a list of items")
    if len(value) > MAX_ITEMS:
        raise wrong(f"must hold at most {MAX_ITEMS} items, but holds {len(value)}")
    items = [_item(place, given) for place, given in enumerate(value)]
    return [item for item in items if item is not None]


def numbered(items: list[Item], stem: str) -> list[Item]:
    """The items, each with an id: its own, or one made from `stem` and its place."""
    prefixes = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_"}
    return [
        {**item, "id": item.get("id") or f"{prefixes[item['type']]}{stem}{place:04x}"}
        for place, item in enumerate(items)
    ]


def chat_messages(items: list[Item]) -> list[dict[str, Any]]:
    """The items as messages of a chat: calls belong to the assistant's turn that they stand in."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item["type"]:
            case "message":
                messages.append({"role": item["role"], "content": "".join(part["text"] for part in item["content"])})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item["name"], "arguments": item["arguments"]}
                calls = messages[-1].setdefault("tool_calls", [])
                calls.append({"id": item["call_id"], "type": "function", "function": function})
            case _:
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages


def _item(place: int, given: Any) -> Item | None:
    if not isinstance(given, dict):
        raise wrong(f"must hold objects, but item {place} is none")
    kind = given.get("type", "message" if "role" in given else None)
    match kind:
        case "message":
            item = _given_message(place, given)
        case "function_call":
            texts = {name: _text(place, given, name) for name in ("call_id", "name", "arguments")}
            item = {"type": "function_call", "status": "completed", **texts}
        case "function_call_output":
            output = _joined(place, given.get("output"), "output")
            call_id = _text(place, given, "call_id")
            item = {"type": "function_call_output", "status": "completed", "call_id": call_id, "output": output}
        case "reasoning":
            return None
        case str():
            known = "'message', 'function_call' and 'function_call_output'"
            raise not_supported(f"holds an item of type {kind[:40]!r} at {place}; only {known} are supported")
        case _:
            raise wrong(f"must hold items with a `type` or messages with a `role`, but item {place} has neither")
    known_id = given.get("id")
    return {"id": known_id, **item} if isinstance(known_id, str) and 0 < len(known_id) <= 128 else item


def _given_message(place: int, given: dict[str, Any]) -> Item:
    role = given.get("role")
    if role not in (*_INPUT_ROLES, "assistant"):
        roles = "'user', 'system', 'developer' or 'assistant'"
        raise wrong(f"must hold messages of role {roles}, but the role of item {place} is {str(role)[:40]!r}")
    return _message(role, _joined(place, given.get("content"), "content"))


def _message(role: str, text: str) -> Item:
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "role": role, "status": "completed", "content": [part]}


def _joined(place: int, content: Any, field: str) -> str:
    """Text, or a list of text parts, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"needs `{field}` in item {place}: a string or a list of text parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in (*_TEXT_PARTS, "refusal"):
            raise not_supported(f"holds a part of type {kind[:40]!r} in item {place}; only text is supported")
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind is None or not isinstance(text, str):
            raise wrong(f'must hold parts like {{"type": "input_text", "text": "…"}}, but item {place} has another')
        texts.append(text)
    return "".join(texts)


def _text(place: int, given: dict[str, Any], field: str) -> str:
    value = given.get(field)
    if not isinstance(value, str) or (not value and field != "arguments"):
        raise wrong(f"needs `{field}` in item {place}: a string")
    return value
