"""The OpenAPI document describes what there is, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import orjson
import pytest
from fastapi.routing import APIRoute

from molink_gateway.app import Parts, make_app
from molink_gateway.openapi_document import document
from molink_gateway.requests import parse_chat, parse_completion
from molink_gateway.settings import GatewaySettings

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def routes() -> set[tuple[str, str]]:
    """Method and address of each route, its parameters without names."""
    absent: Any = None  # a route is asked for, not called
    others = dict.fromkeys((field.name for field in dataclasses.fields(Parts) if field.name != "settings"), absent)
    parts = Parts(settings=GatewaySettings(), **others)
    found = [route for route in make_app(parts).routes if isinstance(route, APIRoute)]
    return {(method, nameless(route.path)) for route in found for method in (route.methods or set()) - {"HEAD"}}


def nameless(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", path)


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    described = {
        (method.upper(), nameless(path))
        for path, item in DOCUMENT["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == routes()


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert names == SCHEMAS.keys()


def test_operations_have_names_of_their_own_and_errors_in_one_shape() -> None:
    operations = [
        operation for item in DOCUMENT["paths"].values() for name, operation in item.items() if name != "parameters"
    ]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        for status, response in operation["responses"].items():
            if status not in ("200", "503"):
                shape = "MessagesError" if operation["operationId"] in ("createMessage", "countTokens") else "Error"
                assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{shape}"}
            if status in ("429", "503"):
                assert "Retry-After" in response["headers"]


@pytest.mark.parametrize(
    ("schema", "field", "values"),
    [
        ("ChatRequest", "stop", ["a", ["a", "b"], None]),
        ("ChatRequest", "stop_token_ids", [[1, 2], None]),
        ("ChatRequest", "logit_bias", [{"5": -1.5}, None]),
        ("ChatRequest", "tool_choice", ["none", None]),
        ("ChatRequest", "tools", [[{"type": "function", "function": {"name": "f"}}], None]),
        ("CompletionRequest", "prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]]),
    ],
)
def test_each_shape_that_is_described_is_taken(schema: str, field: str, values: list[Any]) -> None:
    """One value for each alternative, so that a shape that is described and refused is found."""
    described = SCHEMAS[schema]["properties"][field]
    num_shapes = len(described["anyOf"]) - (2 if field == "tool_choice" else 0)
    assert len(values) == num_shapes
    for value in values:
        body = {"model": "demo", "prompt": "a", "messages": [{"role": "user", "content": "a"}], field: value}
        parse = parse_chat if schema == "ChatRequest" else parse_completion
        parse(orjson.dumps(body))


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name.endswith("Request")])
def test_every_field_of_a_request_says_what_it_takes(name: str) -> None:
    """A check that was renamed, or a new one, would leave its field described as anything."""
    said = {
        field: described.keys() - {"title", "description"} for field, described in SCHEMAS[name]["properties"].items()
    }
    assert [field for field, words in said.items() if not words] == []
