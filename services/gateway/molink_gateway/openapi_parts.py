"""Small parts of JSON schemas. Pure."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TOKEN_IDS: Schema = {"type": "array", "items": COUNT}


def or_null(schema: Schema) -> Schema:
    """The same or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def list_of(items: Schema, **limits: int) -> Schema:
    """An array."""
    return {"type": "array", "items": items, **limits}


def object_of(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these members and, as everywhere in this API, perhaps others."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


TEXT_BLOCK = object_of({"type": {"const": "text"}, "text": TEXT})
TOOL_USE = object_of({"type": {"const": "tool_use"}, "id": TEXT, "name": TEXT, "input": {"type": "object"}})
