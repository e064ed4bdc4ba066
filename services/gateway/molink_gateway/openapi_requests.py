"""Schemas of what a client sends, for the OpenAPI document. Pure.

Requests are described by the pydantic models that check them. A check that takes more shapes than its model can say
(a stop string or a list of them) has its shapes in `_SHAPES`, and a field that is checked later in `_FIELDS`; what is
in neither is described as anything.
"""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from molink_gateway.openapi_parts import (
    TEXT,
    TEXT_BLOCK,
    TOKEN_IDS,
    TOOL_USE,
    Schema,
    list_of,
    object_of,
    or_null,
)


def _parts(*kinds: str) -> Schema:
    part = object_of({"type": {"enum": list(kinds)}, "text": TEXT})
    return {"anyOf": [TEXT, list_of(part)]}


_FUNCTION_CALL = object_of({"function": object_of({"name": TEXT}, {"arguments": {}})}, {"id": {}})
_NAMED_FUNCTION = object_of({"type": {"const": "function"}, "function": object_of({"name": TEXT})})
_INPUT_ITEM: Schema = {
    "anyOf": [
        object_of(
            {
                "role": {"enum": ["user", "system", "developer", "assistant"]},
                "content": _parts("input_text", "output_text", "text"),
            },
            {"type": {"const": "message"}},
        ),
        object_of(
            {
                "type": {"const": "function_call"},
                "call_id": {**TEXT, "minLength": 1},
                "name": {**TEXT, "minLength": 1},
                "arguments": TEXT,
            }
        ),
        object_of(
            {
                "type": {"const": "function_call_output"},
                "call_id": {**TEXT, "minLength": 1},
                "output": _parts("input_text", "output_text", "text"),
            }
        ),
    ]
}

_TEXT_OR_BLOCKS: Schema = {"anyOf": [TEXT, list_of(TEXT_BLOCK)]}
_TOOL_RESULT = object_of({"type": {"const": "tool_result"}, "tool_use_id": TEXT}, {"content": or_null(_TEXT_OR_BLOCKS)})

#: By the name of the check: what it takes.
_SHAPES: dict[str, Schema] = {
    "_stop_strings": {
        "anyOf": [
            {**TEXT, "minLength": 1, "maxLength": 1024},
            list_of({**TEXT, "minLength": 1, "maxLength": 1024}, maxItems=16),
            {"type": "null"},
        ]
    },
    "_token_ids": or_null(TOKEN_IDS),
    "_logit_bias": or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,12}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
    "_content": or_null(_parts("text")),
    "_prompts": {
        "anyOf": [
            TEXT,
            list_of(TEXT, minItems=1, maxItems=128),
            {**TOKEN_IDS, "minItems": 1},
            list_of({**TOKEN_IDS, "minItems": 1}, minItems=1, maxItems=128),
        ]
    },
    "_tool_calls": or_null(list_of(_FUNCTION_CALL)),
    "_tool_type": {"const": "function"},
    "_name": {**TEXT, "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    "_parameters": or_null({"type": "object", "properties": {"type": {"const": "object"}}}),
    "_tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required", "any"]},
            _NAMED_FUNCTION,
            object_of(
                {
                    "type": {"const": "allowed_tools"},
                    "allowed_tools": object_of(
                        {"mode": {"enum": ["auto", "required"]}, "tools": list_of(_NAMED_FUNCTION)}
                    ),
                }
            ),
            {"type": "null"},
        ]
    },
    "items_of": {"anyOf": [TEXT, list_of(_INPUT_ITEM, minItems=1, maxItems=2048)]},
    "blocks_of": {"anyOf": [TEXT, list_of({"anyOf": [TEXT_BLOCK, TOOL_USE, _TOOL_RESULT]})]},
    "system_of": or_null(_TEXT_OR_BLOCKS),
    "_metadata": or_null(
        {
            "type": "object",
            "maxProperties": 16,
            "propertyNames": {"maxLength": 64},
            "additionalProperties": {**TEXT, "maxLength": 512},
        }
    ),
}

_FLAG: Schema = {"type": ["boolean", "null"]}
_SCHEMA_OF_ANSWER: Schema = {"type": ["object", "boolean", "null"]}
_JSON_SCHEMA: Schema = {"type": ["object", "boolean", "string", "null"]}
_UNSET: Schema = {"enum": [None, False]}
_TEXT_OR_UNSET: Schema = {"anyOf": [TEXT, _UNSET]}
_CHOICE: Schema = {"anyOf": [list_of(TEXT, minItems=1, maxItems=4096), _UNSET]}

#: Fields of models that are checked only when the answer's grammar is made.
_FIELDS: dict[str, Schema] = {
    "response_format": {
        "anyOf": [
            object_of({"type": {"enum": ["text", "json_object"]}}),
            object_of(
                {
                    "type": {"const": "json_schema"},
                    "json_schema": object_of(
                        {}, {"schema": _SCHEMA_OF_ANSWER, "strict": {"type": ["boolean", "null"]}}
                    ),
                }
            ),
            {"type": "null"},
        ]
    },
    "structured_outputs": or_null(
        object_of(
            {},
            {
                "json": _JSON_SCHEMA,
                "regex": _TEXT_OR_UNSET,
                "choice": _CHOICE,
                "grammar": _TEXT_OR_UNSET,
                "json_object": _FLAG,
                "whitespace_pattern": _TEXT_OR_UNSET,
                "disable_any_whitespace": {},
            },
        )
    ),
    "guided_json": _JSON_SCHEMA,
    "guided_regex": _TEXT_OR_UNSET,
    "guided_choice": _CHOICE,
    "guided_grammar": _TEXT_OR_UNSET,
}


class _RequestSchema(GenerateJsonSchema):
    """What comes before a model's own check decides what is taken."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        name = getattr(schema["function"]["function"], "__name__", "")
        inner = self.generate_inner(schema["schema"])  # so that the models below are described, too
        if name == "_tools":
            return or_null({**inner, "maxItems": 128})
        return dict(_SHAPES.get(name, {}))

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Without `default`: what is left out is not the same as null."""
        return self.generate_inner(schema["schema"])


def request_schemas(*models: type[BaseModel]) -> dict[str, Schema]:
    """The schemas of requests and of all that they hold, by name."""
    found: dict[str, Schema] = {}
    for model in models:
        schema = model.model_json_schema(
            ref_template="#/components/schemas/{model}", schema_generator=_RequestSchema, mode="validation"
        )
        found |= schema.pop("$defs", {})
        for name, described in schema["properties"].items():
            if described.keys() <= {"title", "description"}:
                described.update(_FIELDS.get(name, {}))
        found[model.__name__] = schema
    return found
