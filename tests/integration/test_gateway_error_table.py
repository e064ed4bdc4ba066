"""Every error of `docs/api.md`, field by field: status, the whole body, and when to come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from molink.embedded import EmbeddedServer
from molink_common.messages import RefusalCode, Refused, SubmitSequence
from tests.integration.test_gateway_pool import FakePool, ready_gateway

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BAD = "invalid_request_error"

Case = tuple[str, dict[str, Any], str, str | None, str | None]
#: Path, fields, then what the error says: message, param and code. All are 400.
BAD_REQUESTS: list[Case] = [
    (CHAT, {"model": None}, "`model` must be a valid string, but it is null.", "model", None),
    (CHAT, {"messages": []}, "`messages` must hold at least one message.", "messages", None),
    (
        CHAT,
        {"messages": [{"role": "user"}]},
        "`messages[0]` needs `content`: a string or a list of text parts (role 'user').",
        "messages[0]",
        None,
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "`messages[0].content` holds a part of type 'image_url' at 0; only 'text' is supported.",
        "messages[0].content",
        "unsupported",
    ),
    (
        CHAT,
        {"temperature": 3},
        "`temperature` must be less than or equal to 2, but it is 3.",
        "temperature",
        None,
    ),
    (CHAT, {"n": 17}, "`n` must be less than or equal to 16, but it is 17.", "n", None),
    (CHAT, {"priority": 1001}, "`priority` must be less than or equal to 1000, but it is 1001.", "priority", None),
    (CHAT, {"priority": "high"}, '`priority` must be a valid integer, but it is "high".', "priority", None),
    (CHAT, {"stop": ["x"] * 17}, "`stop` must hold at most 16 strings, but holds 17.", "stop", None),
    (
        CHAT,
        {"max_tokens": 100_000},
        "`max_tokens` is too large: 100000. This model's maximum context length is 256 tokens and the prompt has {n}, "
        "so at most {left} are left for the answer.",
        "max_tokens",
        "context_length_exceeded",
    ),
    (
        CHAT,
        {"min_tokens": 9, "max_tokens": 5},
        "`min_tokens` (9) must not be larger than `max_tokens` (5).",
        "min_tokens",
        None,
    ),
    (CHAT, {"top_logprobs": 2}, "`top_logprobs` needs `logprobs` to be true.", "top_logprobs", None),
    (
        CHAT,
        {"stream_options": {"include_usage": True}},
        "`stream_options` needs `stream` to be true.",
        "stream_options",
        None,
    ),
    (
        CHAT,
        {"logit_bias": {"1000": 1}},
        "`logit_bias` holds token id 1000, but the model's vocabulary ends at 299.",
        "logit_bias",
        None,
    ),
    (
        CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        "`continue_final_message` and `add_generation_prompt` exclude each other: the answer either goes on with the "
        "last message or begins a new one.",
        "continue_final_message",
        None,
    ),
    (
        CHAT,
        {"functions": [{"name": "f"}]},
        "`functions` is not supported by this server. Use `tools`, which came in its place.",
        "functions",
        "unsupported",
    ),
    (
        CHAT,
        {"modalities": ["audio"]},
        "`modalities` is not supported by this server. Leave it out.",
        "modalities",
        "unsupported",
    ),
    (
        CHAT,
        {"tool_choice": "required"},
        "`tool_choice` asks for a call, but `tools` holds none.",
        "tool_choice",
        None,
    ),
    (
        CHAT,
        {"response_format": {"type": "xml"}},
        '`response_format.type` must be one of `text`, `json_object`, `json_schema`, but it is "xml".',
        "response_format.type",
        None,
    ),
    (COMPLETION, {"prompt": []}, "`prompt` must be a text, a list of texts, a list of token ids or a list of those, "
     "and not empty.", "prompt", None),
    (COMPLETION, {"prompt": ""}, "`prompt` is empty; it must hold at least one token.", "prompt", None),
    (
        COMPLETION,
        {"prompt": [5] * 300},
        "This model's maximum context length is 256 tokens, but the prompt has 300 tokens and at least 1 must be left "
        "for the answer. Shorten the prompt.",
        "prompt",
        "context_length_exceeded",
    ),
    (
        COMPLETION,
        {"suffix": "end"},
        "`suffix` is not supported by this server. Text is completed only at its end: put what comes before into "
        "`prompt`.",
        "suffix",
        "unsupported",
    ),
    (
        COMPLETION,
        {"best_of": 2},
        "`best_of` is not supported unless it equals `n`. Leave it out.",
        "best_of",
        "unsupported",
    ),
]  # fmt: skip


@pytest.fixture
async def http(pool: FakePool, nats_server: EmbeddedServer) -> AsyncIterator[httpx.AsyncClient]:
    async with ready_gateway(nats_server, max_body_bytes=100_000) as client:
        yield client


def error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def test_bad_requests(http: httpx.AsyncClient, pool: FakePool) -> None:
    num_tokens = len(pool.tokenizer.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n").ids)
    for path, fields, message, param, code in BAD_REQUESTS:
        own = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
        for stream in (False, True) if "stream_options" not in fields else (False,):
            response = await http.post(path, json={"model": "demo", "stream": stream, **own, **fields})
            told = message.replace("{n}", str(num_tokens)).replace("{left}", str(256 - num_tokens))
            assert (response.status_code, response.json()) == (400, error(told, BAD, param, code))
            assert "retry-after" not in response.headers
    assert pool.submitted.empty()


async def test_bodies_that_are_no_requests(http: httpx.AsyncClient) -> None:
    for body, message, code in (
        (b"", "The request body is empty; it must be a JSON object.", "invalid_json"),
        (b"[]", "The request body must be a JSON object.", "invalid_json"),
    ):
        response = await http.post(CHAT, content=body)
        assert (response.status_code, response.json()) == (400, error(message, BAD, None, code))
    response = await http.post(CHAT, content=b"{")
    told = response.json()["error"]
    assert told.pop("message").startswith("The request body is not valid JSON: ")
    assert told == {"type": BAD, "param": None, "code": "invalid_json"}
    response = await http.post(CHAT, json={"messages": HELLO})
    assert response.json() == error("`model` is required.", BAD, "model", "missing_required_parameter")
    response = await http.post(CHAT, content=b" " * 100_001)
    message = "The request body is larger than the limit of 100000 bytes."
    assert (response.status_code, response.json()) == (413, error(message, BAD, None, "request_too_large"))


async def test_what_is_not_there(http: httpx.AsyncClient) -> None:
    model = error(
        "The model `gpt-4` does not exist here. Served: `Small-Test`, `demo`.", BAD, "model", "model_not_found"
    )
    response = await http.post(CHAT, json={"model": "gpt-4", "messages": HELLO})
    assert (response.status_code, response.json()) == (404, model)
    response = await http.get("/v1/models/gpt-4")
    assert (response.status_code, response.json()) == (404, model)
    response = await http.get("/v2/models")
    message = "There is nothing at /v2/models. The API is below /v1, as /openapi.json tells."
    assert (response.status_code, response.json()) == (404, error(message, BAD, None, None))
    response = await http.get(CHAT)
    message = f"{CHAT} does not take GET."
    assert (response.status_code, response.json()) == (405, error(message, BAD, None, None))


@pytest.mark.parametrize(
    ("code", "status", "kind", "param"),
    [
        (RefusalCode.UNKNOWN_MODEL, 404, BAD, "model"),
        (RefusalCode.TOO_LONG, 400, BAD, None),
        (RefusalCode.QUEUE_FULL, 429, "rate_limit_error", None),
        (RefusalCode.OVERLOADED, 429, "rate_limit_error", None),
        (RefusalCode.RATE_LIMITED, 429, "rate_limit_error", None),
        (RefusalCode.NO_PIPELINE, 503, "service_unavailable", None),
    ],
)
async def test_refusals(
    http: httpx.AsyncClient, pool: FakePool, code: RefusalCode, status: int, kind: str, param: str | None
) -> None:
    pool.refusal = lambda submit: Refused(sequence=submit.sequence, code=code, message="Not now.", retry_after_s=1.5)
    for path, own in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "Hello"})):
        response = await http.post(path, json={"model": "demo", **own})
        assert (response.status_code, response.json()) == (status, error("Not now.", kind, param, code.value))
        assert response.headers.get("retry-after") == ("2" if status in (429, 503) else None)


async def test_an_error_behind_the_first_chunk_is_a_chunk(http: httpx.AsyncClient, pool: FakePool) -> None:
    async def fail(submit: SubmitSequence) -> None:
        await pool.say(submit.sequence, 0, 5)
        await pool.fail(submit, "The pipeline is gone.")

    pool.answer = fail
    response = await http.post(CHAT, json={"model": "demo", "messages": HELLO, "stream": True})
    assert response.status_code == 200
    *_, last, done = [line for line in response.text.splitlines() if line.startswith("data: ")]
    told = error("The pipeline is gone.", "service_unavailable", None, "sequence_failed")
    assert json.loads(last.removeprefix("data: ")) == told
    assert done == "data: [DONE]"
