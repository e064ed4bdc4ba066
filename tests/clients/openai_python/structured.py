"""Structured output: the answer is JSON of the asked shape, whatever the model would rather say."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from tests.clients.openai_python.connection import client, user
from tests.clients.reporting import MODEL, Checks, same


class Person(BaseModel):
    """What is asked for: bounded, so that a small model comes to an end."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    city: Literal["Paris", "Rome", "Oslo"]
    hobbies: Annotated[list[Annotated[str, Field(max_length=12)]], Field(max_length=2)]


QUESTION = "Invent a person. Answer in JSON."


def json_object() -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user('Answer with this JSON and nothing else: {"city": "Paris"}'),
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    text = str(answer.choices[0].message.content)
    assert text.lstrip().startswith("{"), text
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict), text
    return text


def parse() -> str:
    answer = client.chat.completions.parse(
        model=MODEL, messages=user(QUESTION), response_format=Person, temperature=1.0, seed=1, max_tokens=200
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person), answer
    same(answer.choices[0].finish_reason, "stop", "finish_reason")
    return repr(person)


def stream_of_parsed() -> str:
    kinds = set()
    with client.chat.completions.stream(
        model=MODEL, messages=user(QUESTION), response_format=Person, temperature=0, max_tokens=200
    ) as stream:
        for event in stream:
            kinds.add(event.type)
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person), final
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    return repr(final.choices[0].message.parsed)


def structured_outputs_of_vllm() -> str:
    told = []
    forms: list[dict[str, object]] = [
        {"choice": ["yes", "no"]},
        {"regex": "[0-9]{3}-[0-9]{2}"},
        {"json": Person.model_json_schema()},
    ]
    for form in forms:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=user("Is the sky blue?"),
            temperature=1.0,
            max_tokens=200,
            extra_body={"structured_outputs": form},
        )
        told.append(str(answer.choices[0].message.content))
    assert told[0] in ("yes", "no"), told
    assert len(told[1]) == 6 and told[1][3] == "-", told
    Person.model_validate_json(told[2])
    return " | ".join(told)


def completion_by_schema() -> str:
    answer = client.completions.create(
        model=MODEL,
        prompt="A person as JSON:",
        max_tokens=200,
        temperature=0,
        extra_body={"structured_outputs": {"json": Person.model_json_schema()}},
    )
    return repr(Person.model_validate_json(answer.choices[0].text))


def add_to(checks: Checks) -> None:
    """Every check of this file."""
    for check in (json_object, parse, stream_of_parsed, structured_outputs_of_vllm, completion_by_schema):
        checks.add(check)
