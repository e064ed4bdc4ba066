"""Schemas of what a client sends and reads, for the OpenAPI document. Pure.

Requests are described by the pydantic models that check them. A check that takes more shapes than its model can say
(a stop string or a list of them) has its shapes in `_SHAPES`; one that is not there is described as anything.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TOKEN_IDS: Schema = {"type": "array", "items": _COUNT}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list_of(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _parts(*kinds: str) -> Schema:
    part = _answer({"type": {"enum": list(kinds)}, "text": _TEXT})
    return {"anyOf": [_TEXT, _list_of(part)]}


def _answer(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these members and, as everywhere in this API, perhaps others."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


_FUNCTION_CALL = _answer({"function": _answer({"name": _TEXT}, {"arguments": {}})}, {"id": {}})
_NAMED_FUNCTION = _answer({"type": {"const": "function"}, "function": _answer({"name": _TEXT})})
_INPUT_ITEM: Schema = {
    "anyOf": [
        _answer(
            {
                "role": {"enum": ["user", "system", "developer", "assistant"]},
                "content": _parts("input_text", "output_text", "text"),
            },
            {"type": {"const": "message"}},
        ),
        _answer(
            {
                "type": {"const": "function_call"},
                "call_id": {**_TEXT, "minLength": 1},
                "name": {**_TEXT, "minLength": 1},
                "arguments": _TEXT,
            }
        ),
        _answer(
            {
                "type": {"const": "function_call_output"},
                "call_id": {**_TEXT, "minLength": 1},
                "output": _parts("input_text", "output_text", "text"),
            }
        ),
    ]
}

_TEXT_BLOCK = _answer({"type": {"const": "text"}, "text": _TEXT})
_TEXT_OR_BLOCKS: Schema = {"anyOf": [_TEXT, _list_of(_TEXT_BLOCK)]}
_TOOL_USE = _answer({"type": {"const": "tool_use"}, "id": _TEXT, "name": _TEXT, "input": {"type": "object"}})
_TOOL_RESULT = _answer({"type": {"const": "tool_result"}, "tool_use_id": _TEXT}, {"content": _or_null(_TEXT_OR_BLOCKS)})

#: By the name of the check: what it takes.
_SHAPES: dict[str, Schema] = {
    "_stop_strings": {
        "anyOf": [
            {**_TEXT, "minLength": 1, "maxLength": 1024},
            _list_of({**_TEXT, "minLength": 1, "maxLength": 1024}, maxItems=16),
            {"type": "null"},
        ]
    },
    "_token_ids": _or_null(_TOKEN_IDS),
    "_logit_bias": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,12}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
    "_content": _or_null(_parts("text")),
    "_prompts": {
        "anyOf": [
            _TEXT,
            _list_of(_TEXT, minItems=1, maxItems=128),
            {**_TOKEN_IDS, "minItems": 1},
            _list_of({**_TOKEN_IDS, "minItems": 1}, minItems=1, maxItems=128),
        ]
    },
    "_tool_calls": _or_null(_list_of(_FUNCTION_CALL)),
    "_tool_type": {"const": "function"},
    "_name": {**_TEXT, "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    "_parameters": _or_null({"type": "object", "properties": {"type": {"const": "object"}}}),
    "_tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required", "any"]},
            _NAMED_FUNCTION,
            _answer(
                {
                    "type": {"const": "allowed_tools"},
                    "allowed_tools": _answer(
                        {"mode": {"enum": ["auto", "required"]}, "tools": _list_of(_NAMED_FUNCTION)}
                    ),
                }
            ),
            {"type": "null"},
        ]
    },
    "items_of": {"anyOf": [_TEXT, _list_of(_INPUT_ITEM, minItems=1, maxItems=2048)]},
    "blocks_of": {"anyOf": [_TEXT, _list_of({"anyOf": [_TEXT_BLOCK, _TOOL_USE, _TOOL_RESULT]})]},
    "system_of": _or_null(_TEXT_OR_BLOCKS),
    "_metadata": _or_null(
        {
            "type": "object",
            "maxProperties": 16,
            "propertyNames": {"maxLength": 64},
            "additionalProperties": {**_TEXT, "maxLength": 512},
        }
    ),
}


class _RequestSchema(GenerateJsonSchema):
    """What comes before a model's own check decides what is taken."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        name = getattr(schema["function"]["function"], "__name__", "")
        inner = self.generate_inner(schema["schema"])  # so that the models below are described, too
        if name == "_tools":
            return _or_null({**inner, "maxItems": 128})
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
        found[model.__name__] = schema
    return found


_USAGE = _answer(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    {"prompt_tokens_details": _answer({"cached_tokens": _COUNT})},
)
_TOKEN_LOGPROB = {"token": _TEXT, "logprob": {"type": "number"}, "bytes": _list_of(_NUMBER)}
_LOGPROBS = _list_of(_answer({**_TOKEN_LOGPROB, "top_logprobs": _list_of(_answer(_TOKEN_LOGPROB))}))
_CALL = _answer(
    {"id": _TEXT, "type": {"const": "function"}, "function": _answer({"name": _TEXT, "arguments": _TEXT})},
)
_CHAT_MESSAGE = _answer(
    {"role": {"const": "assistant"}, "content": _or_null(_TEXT), "refusal": {"type": "null"}},
    {"tool_calls": _list_of(_CALL)},
)
_HEAD: dict[str, Schema] = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_OUTPUT_TEXT = _answer({"type": {"const": "output_text"}, "text": _TEXT, "annotations": _list_of({})})
_OUTPUT_ITEM: Schema = {
    "oneOf": [
        _answer(
            {
                "type": {"const": "message"},
                "id": _TEXT,
                "role": {"const": "assistant"},
                "status": {"enum": ["in_progress", "completed", "incomplete"]},
                "content": _list_of(_OUTPUT_TEXT),
            }
        ),
        _answer(
            {
                "type": {"const": "function_call"},
                "id": _TEXT,
                "call_id": _TEXT,
                "name": _TEXT,
                "arguments": _TEXT,
                "status": {"enum": ["in_progress", "completed", "incomplete"]},
            }
        ),
    ]
}
_RESPONSE_USAGE = _answer(
    {
        "input_tokens": _COUNT,
        "input_tokens_details": _answer({"cached_tokens": _COUNT}),
        "output_tokens": _COUNT,
        "output_tokens_details": _answer({"reasoning_tokens": _COUNT}),
        "total_tokens": _COUNT,
    }
)
_READINESS = _answer({"status": {"enum": ["ok", "unavailable"]}, "reason": _TEXT})
_MODEL = _answer(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "root": _TEXT,
        "max_model_len": {"type": "integer", "minimum": 1},
    }
)

#: What a client reads, by name.
ANSWER_SCHEMAS: dict[str, Schema] = {
    "StreamEvent": {
        **_answer({"data": _TEXT}, {"event": _TEXT, "id": _TEXT}),
        "description": "One of the events of a stream. `data` is JSON, or `[DONE]` at the end.",
    },
    "Error": _answer(
        {
            "error": _answer(
                {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)},
            )
        }
    ),
    "Usage": _USAGE,
    "ChatCompletion": _answer(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list_of(
                _answer(
                    {
                        "index": _COUNT,
                        "message": _CHAT_MESSAGE,
                        "logprobs": _or_null(_answer({"content": _LOGPROBS})),
                        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
                    }
                ),
                minItems=1,
            ),
            "usage": {"$ref": "#/components/schemas/Usage"},
        }
    ),
    "Completion": _answer(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": _list_of(
                _answer(
                    {
                        "index": _COUNT,
                        "text": _TEXT,
                        "logprobs": _or_null(
                            _answer({"tokens": _list_of(_TEXT), "text_offset": _list_of(_COUNT)}),
                        ),
                        "finish_reason": {"enum": ["stop", "length"]},
                    }
                ),
                minItems=1,
            ),
            "usage": {"$ref": "#/components/schemas/Usage"},
        }
    ),
    "Response": _answer(
        {
            "id": {**_TEXT, "pattern": "^resp_[0-9a-f]{32}$"},
            "object": {"const": "response"},
            "created_at": _COUNT,
            "status": {"enum": ["completed", "incomplete", "failed", "in_progress"]},
            "error": _or_null(_answer({"code": _TEXT, "message": _TEXT})),
            "incomplete_details": _or_null(_answer({"reason": _TEXT})),
            "instructions": _or_null(_TEXT),
            "metadata": {"type": "object", "additionalProperties": _TEXT},
            "model": _TEXT,
            "output": _list_of(_OUTPUT_ITEM),
            "parallel_tool_calls": {"type": "boolean"},
            "tool_choice": {},
            "tools": _list_of({"type": "object"}),
            "usage": _or_null(_RESPONSE_USAGE),
        }
    ),
    "ResponseItems": _answer(
        {
            "object": {"const": "list"},
            "data": _list_of(_answer({"id": _TEXT, "type": _TEXT})),
            "first_id": _TEXT,
            "last_id": _TEXT,
            "has_more": {"type": "boolean"},
        }
    ),
    "Message": _answer(
        {
            "id": _TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": _TEXT,
            "content": _list_of({"oneOf": [_TEXT_BLOCK, _TOOL_USE]}),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": _or_null(_TEXT),
            "usage": _answer({"input_tokens": _COUNT, "output_tokens": _COUNT, "cache_read_input_tokens": _COUNT}),
        }
    ),
    "MessagesError": _answer({"type": {"const": "error"}, "error": _answer({"type": _TEXT, "message": _TEXT})}),
    "TokenCount": _answer({"input_tokens": _COUNT}),
    "DeletedResponse": _answer({"id": _TEXT, "object": {"const": "response"}, "deleted": {"const": True}}),
    "Model": _MODEL,
    "Models": _answer({"object": {"const": "list"}, "data": _list_of(_MODEL)}),
    "Tokens": _answer(
        {
            "count": _COUNT,
            "max_model_len": {"type": "integer", "minimum": 1},
            "tokens": _TOKEN_IDS,
            "token_strs": _or_null(_list_of(_TEXT)),
        }
    ),
    "Text": _answer({"prompt": _TEXT}),
    "Readiness": _READINESS,
    "Health": _answer({"status": {"const": "ok"}, "ready": {"type": "boolean"}, "reason": _TEXT}),
    "Version": _answer({"version": _TEXT, "protocol": _COUNT}),
    "ClusterState": _answer({"ready": {"type": "boolean"}, "reason": _TEXT, "workers": _list_of({"type": "object"})}),
}
