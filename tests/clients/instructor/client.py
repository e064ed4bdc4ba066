"""Instructor: extraction of typed values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from tests.clients.reporting import API_KEY, BASE_URL, MODEL, TIMEOUT_S, Checks

checks = Checks("instructor")
connection = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)


class Meeting(BaseModel):
    """What is read out of a sentence."""

    who: Annotated[str, Field(max_length=20)]
    day: Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
    people: Annotated[int, Field(ge=1, le=20)]


ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Read this: Ann meets four people on Tuesday."}],
    "temperature": 0,
    "max_tokens": 300,
}


def _extracted(mode: instructor.Mode) -> str:
    client = instructor.from_openai(connection, mode=mode)
    meeting, raw = client.chat.completions.create_with_completion(response_model=Meeting, max_retries=1, **ASKED)
    assert isinstance(meeting, Meeting), meeting
    assert raw.usage.completion_tokens > 0, raw
    return repr(meeting)


@checks.add
def by_tool() -> str:
    return _extracted(instructor.Mode.TOOLS)


@checks.add
def by_schema() -> str:
    return _extracted(instructor.Mode.JSON_SCHEMA)


@checks.add
def partly_while_it_streams() -> str:
    client = instructor.from_openai(connection, mode=instructor.Mode.JSON_SCHEMA)
    partial = list(client.chat.completions.create_partial(response_model=Meeting, **ASKED))
    assert Meeting.model_validate(partial[-1].model_dump()), partial
    return f"{len(partial)} states, last {partial[-1]!r}"


@checks.add
def several_as_they_come() -> str:
    class Colour(BaseModel):
        """A colour."""

        model_config = ConfigDict(extra="forbid")
        name: Literal["red", "green", "blue"]

    client = instructor.from_openai(connection, mode=instructor.Mode.TOOLS)
    stream: Iterable[Any] = client.chat.completions.create_iterable(
        response_model=Colour, **(ASKED | {"max_tokens": 60, "messages": [{"role": "user", "content": "Two colours."}]})
    )
    colours = list(stream)
    assert colours and all(isinstance(colour, Colour) for colour in colours), colours
    return f"{len(colours)} values"


if __name__ == "__main__":
    checks.run()
