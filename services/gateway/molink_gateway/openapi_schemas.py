"""Schemas of what a client reads, for the OpenAPI document."""

from __future__ import annotations

from molink_gateway.openapi_parts import (
    COUNT,
    NUMBER,
    TEXT,
    TEXT_BLOCK,
    TOKEN_IDS,
    TOOL_USE,
    Schema,
    list_of,
    object_of,
    or_null,
)

_USAGE = object_of(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {"prompt_tokens_details": object_of({"cached_tokens": COUNT})},
)
_TOKEN_LOGPROB = {"token": TEXT, "logprob": {"type": "number"}, "bytes": list_of(NUMBER)}
_LOGPROBS = list_of(object_of({**_TOKEN_LOGPROB, "top_logprobs": list_of(object_of(_TOKEN_LOGPROB))}))
_CALL = object_of(
    {"id": TEXT, "type": {"const": "function"}, "function": object_of({"name": TEXT, "arguments": TEXT})},
)
_CHAT_MESSAGE = object_of(
    {"role": {"const": "assistant"}, "content": or_null(TEXT), "refusal": {"type": "null"}},
    {"tool_calls": list_of(_CALL)},
)
_HEAD: dict[str, Schema] = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT}
_OUTPUT_TEXT = object_of({"type": {"const": "output_text"}, "text": TEXT, "annotations": list_of({})})
_OUTPUT_ITEM: Schema = {
    "oneOf": [
        object_of(
            {
                "type": {"const": "message"},
                "id": TEXT,
                "role": {"const": "assistant"},
                "status": {"enum": ["in_progress", "completed", "incomplete"]},
                "content": list_of(_OUTPUT_TEXT),
            }
        ),
        object_of(
            {
                "type": {"const": "function_call"},
                "id": TEXT,
                "call_id": TEXT,
                "name": TEXT,
                "arguments": TEXT,
                "status": {"enum": ["in_progress", "completed", "incomplete"]},
            }
        ),
    ]
}
_RESPONSE_USAGE = object_of(
    {
        "input_tokens": COUNT,
        "input_tokens_details": object_of({"cached_tokens": COUNT}),
        "output_tokens": COUNT,
        "output_tokens_details": object_of({"reasoning_tokens": COUNT}),
        "total_tokens": COUNT,
    }
)
_READINESS = object_of({"status": {"enum": ["ok", "unavailable"]}, "reason": TEXT})
_MODEL = object_of(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": TEXT,
        "root": TEXT,
        "max_model_len": {"type": "integer", "minimum": 1},
    }
)

#: What a client reads, by name.
ANSWER_SCHEMAS: dict[str, Schema] = {
    "StreamEvent": {
        **object_of({"data": TEXT}, {"event": TEXT, "id": TEXT}),
        "description": "One of the events of a stream. `data` is JSON, or `[DONE]` at the end.",
    },
    "Error": object_of(
        {
            "error": object_of(
                {"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": or_null(TEXT)},
            )
        }
    ),
    "Usage": _USAGE,
    "ChatCompletion": object_of(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": list_of(
                object_of(
                    {
                        "index": COUNT,
                        "message": _CHAT_MESSAGE,
                        "logprobs": or_null(object_of({"content": _LOGPROBS})),
                        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
                    }
                ),
                minItems=1,
            ),
            "usage": {"$ref": "#/components/schemas/Usage"},
        }
    ),
    "Completion": object_of(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": list_of(
                object_of(
                    {
                        "index": COUNT,
                        "text": TEXT,
                        "logprobs": or_null(
                            object_of({"tokens": list_of(TEXT), "text_offset": list_of(COUNT)}),
                        ),
                        "finish_reason": {"enum": ["stop", "length"]},
                    }
                ),
                minItems=1,
            ),
            "usage": {"$ref": "#/components/schemas/Usage"},
        }
    ),
    "Response": object_of(
        {
            "id": {**TEXT, "pattern": "^resp_[0-9a-f]{32}$"},
            "object": {"const": "response"},
            "created_at": COUNT,
            "status": {"enum": ["completed", "incomplete", "failed", "in_progress"]},
            "error": or_null(object_of({"code": TEXT, "message": TEXT})),
            "incomplete_details": or_null(object_of({"reason": TEXT})),
            "instructions": or_null(TEXT),
            "metadata": {"type": "object", "additionalProperties": TEXT},
            "model": TEXT,
            "output": list_of(_OUTPUT_ITEM),
            "parallel_tool_calls": {"type": "boolean"},
            "tool_choice": {},
            "tools": list_of({"type": "object"}),
            "usage": or_null(_RESPONSE_USAGE),
        }
    ),
    "ResponseItems": object_of(
        {
            "object": {"const": "list"},
            "data": list_of(object_of({"id": TEXT, "type": TEXT})),
            "first_id": TEXT,
            "last_id": TEXT,
            "has_more": {"type": "boolean"},
        }
    ),
    "Message": object_of(
        {
            "id": TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": TEXT,
            "content": list_of({"oneOf": [TEXT_BLOCK, TOOL_USE]}),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": or_null(TEXT),
            "usage": object_of({"input_tokens": COUNT, "output_tokens": COUNT, "cache_read_input_tokens": COUNT}),
        }
    ),
    "MessagesError": object_of({"type": {"const": "error"}, "error": object_of({"type": TEXT, "message": TEXT})}),
    "TokenCount": object_of({"input_tokens": COUNT}),
    "DeletedResponse": object_of({"id": TEXT, "object": {"const": "response"}, "deleted": {"const": True}}),
    "Model": _MODEL,
    "Models": object_of({"object": {"const": "list"}, "data": list_of(_MODEL)}),
    "Tokens": object_of(
        {
            "count": COUNT,
            "max_model_len": {"type": "integer", "minimum": 1},
            "tokens": TOKEN_IDS,
            "token_strs": or_null(list_of(TEXT)),
        }
    ),
    "Text": object_of({"prompt": TEXT}),
    "Readiness": _READINESS,
    "Health": object_of({"status": {"const": "ok"}, "ready": {"type": "boolean"}, "reason": TEXT}),
    "Version": object_of({"version": TEXT, "protocol": COUNT}),
    "ClusterState": object_of({"ready": {"type": "boolean"}, "reason": TEXT, "workers": list_of({"type": "object"})}),
}
