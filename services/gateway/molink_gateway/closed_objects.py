"""A schema whose objects hold what it names and no more, as vLLM reads schemas too. Pure.

JSON Schema leaves objects open unless it says otherwise, and a small model fills an open object with properties of its
own until its tokens are used up. Whatever the closed schema allows, the open one allows as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BY_NAME = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTED = ("prefixItems", "anyOf", "oneOf", "allOf")
_ALONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_JOINED = ("$ref", "anyOf", "oneOf", "if", "dependentSchemas", "$dynamicRef")
"""Beside properties, these bring further ones along."""
_SAYS_ITSELF = ("additionalProperties", "unevaluatedProperties", "patternProperties")


def with_closed_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, closed; or as it is, where objects are put together from parts, of which each alone is no whole."""
    if any(_is_put_together(part) for part in _parts(schema)):
        return schema
    closed: dict[str, Any] = _closed(schema)
    return closed


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    changed = dict(schema)
    for key in _BY_NAME:
        if isinstance(schema.get(key), dict):
            changed[key] = {name: _closed(one) for name, one in schema[key].items()}
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            changed[key] = [_closed(one) for one in schema[key]]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            changed[key] = _closed(schema[key])
    if isinstance(schema.get("properties"), dict) and not any(key in schema for key in _SAYS_ITSELF):
        changed["additionalProperties"] = False
    return changed


def _is_put_together(part: dict[str, Any]) -> bool:
    if "allOf" in part or "not" in part or "if" in part:
        return True
    properties, required = part.get("properties"), part.get("required")
    if isinstance(required, list) and not set(map(str, required)) <= set(properties or ()):
        return True
    return properties is not None and any(key in part for key in _JOINED)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in _BY_NAME:
        if isinstance(schema.get(key), dict):
            for one in schema[key].values():
                yield from _parts(one)
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            for one in schema[key]:
                yield from _parts(one)
    for key in _ALONE:
        yield from _parts(schema.get(key))
