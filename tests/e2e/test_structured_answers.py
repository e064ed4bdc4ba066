"""Answers in a form that is asked for: real model, real client, the whole pipeline."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from bench.json_schemas import json_schemas
from tests.e2e.running_system import RunningSystem

QUESTION: list[Any] = [{"role": "user", "content": "Name a town and how many people live there."}]


class Town(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=100_000_000)


@pytest.fixture
def client(running_system: RunningSystem) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running_system.url}/v1", api_key="none", max_retries=0, timeout=60)


def by_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_the_client_parses_its_own_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Town, temperature=1, max_tokens=300, seed=1
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Town)


def test_schemas_are_kept_to_side_by_side(client: openai.OpenAI) -> None:
    schemas = json_schemas(6, seed=3)

    def ask(schema: dict[str, Any]) -> None:
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, response_format=by_schema(schema), temperature=1, max_tokens=600, seed=2
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)

    with ThreadPoolExecutor(len(schemas)) as threads:
        list(threads.map(ask, schemas))


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    fixed: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 1, "seed": 5, "max_tokens": 300}
    fixed["response_format"] = by_schema(Town.model_json_schema())
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**fixed, stream=True)]
    whole = client.chat.completions.create(**fixed)
    assert "".join(pieces) == whole.choices[0].message.content
    Town.model_validate_json("".join(pieces))


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"choice": ["yes", "perhaps"]}, {"yes", "perhaps"}),
        ({"regex": "[0-3]{2}"}, {f"{n}{m}" for n in "0123" for m in "0123"}),
    ],
)
def test_vllms_forms(client: openai.OpenAI, form: dict[str, Any], answers: set[str]) -> None:
    answer = client.completions.create(
        model="demo", prompt="Well?", temperature=1, n=4, extra_body={"structured_outputs": form}
    )
    assert {choice.text for choice in answer.choices} <= answers
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_bad_schema_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="objekt"):
        client.chat.completions.create(model="demo", messages=QUESTION, response_format=by_schema({"type": "objekt"}))
