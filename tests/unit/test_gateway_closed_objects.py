"""Which objects of a schema are closed."""

from __future__ import annotations

from typing import Any

import pytest

from molink_gateway.closed_objects import with_closed_objects

NAME: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}}
CLOSED = {**NAME, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (NAME, CLOSED),
        ({"type": "array", "items": NAME}, {"type": "array", "items": CLOSED}),
        ({"$defs": {"a": NAME}, "$ref": "#/$defs/a"}, {"$defs": {"a": CLOSED}, "$ref": "#/$defs/a"}),
        ({"anyOf": [NAME, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"properties": {"a": NAME}}, {"properties": {"a": CLOSED}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({**NAME, "additionalProperties": True}, {**NAME, "additionalProperties": True}),
        ({**NAME, "patternProperties": {"^x": NAME}}, {**NAME, "patternProperties": {"^x": CLOSED}}),
        ({"additionalProperties": NAME}, {"additionalProperties": CLOSED}),
        ({**NAME, "required": ["name"]}, {**CLOSED, "required": ["name"]}),
    ],
)
def test_objects_that_name_their_properties_are_closed(schema: dict[str, Any], closed: dict[str, Any]) -> None:
    assert with_closed_objects(schema) == closed


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [NAME, {"properties": {"age": {}}}]},
        {**NAME, "anyOf": [{"properties": {"age": {}}}]},
        {**NAME, "$ref": "#/$defs/a", "$defs": {"a": NAME}},
        {**NAME, "required": ["age"]},
        {"not": NAME},
        {"properties": {"deep": {"items": {**NAME, "oneOf": [NAME]}}}},
    ],
)
def test_a_schema_whose_objects_are_put_together_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert with_closed_objects(schema) == schema
