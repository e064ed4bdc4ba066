"""What a request may say about the form of its answer, and what is wrong with the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from bench.json_schemas import json_schemas
from molink_common.sampling import MAX_GRAMMAR_CHARACTERS
from molink_gateway.api_errors import ApiError
from molink_gateway.grammar import grammar_of, lark_grammar

BYTES = LLTokenizer("byte")


def by_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def takes(grammar: str | None, text: str) -> bool:
    """Whether the whole text follows the grammar."""
    assert grammar is not None
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("response_format", "structured_outputs"),
    [(None, None), ({"type": "text"}, None), (None, {}), (None, {"json": None, "json_object": False})],
)
def test_nothing_asked_is_no_grammar(response_format: Any, structured_outputs: Any) -> None:
    assert grammar_of(response_format, structured_outputs) is None


def test_an_object_is_any_object() -> None:
    for grammar in (grammar_of({"type": "json_object"}, None), grammar_of(None, {"json_object": True})):
        assert takes(grammar, '{"a": [1, {"b": null}]}')
        assert not takes(grammar, "[1]")


def test_a_schema_is_kept_to() -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    forms: list[tuple[Any, Any]] = [(by_schema(schema, strict=True), None), (None, {"json": schema})]
    forms.append((None, {"json": json.dumps(schema)}))
    for response_format, structured_outputs in forms:
        grammar = grammar_of(response_format, structured_outputs)
        assert takes(grammar, '{"a": 5}')
        assert takes(grammar, '{\n  "a": 5\n}')
        assert not takes(grammar, '{"a": "5"}')
        assert not takes(grammar, '{"a": 5, "b": 6}')
        assert not takes(grammar, "{}")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "2023-12-31", "0001-01-01"], ["2023-02-29", "1900-02-29", "0000-01-01"]),
        ("date", ["1996-02-28"], ["1996-02-30", "2023-04-31", "2023-13-01"]),
        ("time", ["05:34:59Z", "23:59:59.5+01:00"], ["05:34:60Z", "24:00:00Z", "05:34:59"]),
        ("date-time", ["2024-02-29T05:34:59Z"], ["2023-02-29T05:34:59Z", "2024-02-29T05:34:60Z", "2024-02-29"]),
    ],
)
def test_dates_and_times_are_those_that_exist(kind: str, good: list[str], bad: list[str]) -> None:
    grammar = grammar_of(by_schema({"anyOf": [{"type": "string", "format": kind}, {"type": "null"}]}), None)
    assert [takes(grammar, json.dumps(text)) for text in good + bad] == [True] * len(good) + [False] * len(bad)


def test_a_value_that_looks_like_a_schema_is_left_alone() -> None:
    grammar = grammar_of(by_schema({"const": {"format": "date"}}), None)
    assert takes(grammar, '{"format": "date"}')


def test_whitespace_has_an_end() -> None:
    assert not takes(grammar_of({"type": "json_object"}, None), "{" + " " * 1000 + "}")
    tight = grammar_of(None, {"json_object": True, "disable_any_whitespace": True})
    assert takes(tight, '{"a":[1,2]}')
    assert not takes(tight, '{"a": [1,2]}')


def test_without_strict_what_cannot_be_kept_to_is_left_out_of_account() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    assert takes(grammar_of(by_schema(schema), None), "[1, 1]")
    with pytest.raises(ApiError, match=r"uniqueItems.*strict.*false") as found:
        grammar_of(by_schema(schema, strict=True), None)
    assert (found.value.status, found.value.code) == (400, "unsupported")


def test_choices_regexes_and_grammars() -> None:
    choice = grammar_of(None, {"choice": ['a "quoted" one', "no\n😀", "x\\y/z"]})
    assert all(takes(choice, text) for text in ('a "quoted" one', "no\n😀", "x\\y/z"))
    assert not takes(choice, "no")
    assert takes(grammar_of(None, {"regex": r"\d{3}-[a-z]+/x"}), "123-abc/x")
    assert takes(grammar_of(None, {"grammar": 'start: "a" b\nb: /[0-9]+/'}), "a77")
    assert takes(grammar_of(None, {"grammar": 'root ::= "a" b\nb ::= [0-9]+'}), "a77")


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "param", "says"),
    [
        ("json", None, "response_format", "an object"),
        ({"type": "xml"}, None, "response_format.type", "json_schema"),
        ({}, None, "response_format.type", "must be one of"),
        ({"type": "json_schema"}, None, "response_format.json_schema", "name"),
        (by_schema(5), None, "response_format.json_schema.schema", "object"),
        (by_schema({}, strict="yes"), None, "response_format.json_schema.strict", "true or false"),
        (by_schema({"type": "objekt"}), None, "response_format.json_schema.schema", "objekt"),
        (by_schema({"$ref": "#/$defs/x"}), None, "response_format.json_schema.schema", "/$defs/x"),
        (by_schema({"minimum": 5, "maximum": 3, "type": "integer"}), None, "response_format.json_schema.schema", "5"),
        (by_schema({"type": "string", "pattern": "(a"}), None, "response_format.json_schema.schema", "unclosed"),
        (None, 5, "structured_outputs", "object"),
        (None, {"regex": "(a"}, "structured_outputs.regex", "unclosed"),
        (None, {"regex": ""}, "structured_outputs.regex", "not empty"),
        (None, {"choice": []}, "structured_outputs.choice", "at least one"),
        (None, {"choice": ["a", ""]}, "structured_outputs.choice", "empty"),
        (None, {"choice": "ab"}, "structured_outputs.choice", "list"),
        (None, {"choice": ["a"] * 5000}, "structured_outputs.choice", "4096"),
        (None, {"grammar": "start: nothing"}, "structured_outputs.grammar", "nothing"),
        (None, {"grammar": "root ::= (("}, "structured_outputs.grammar", "cannot be read"),
        (None, {"json": "{"}, "structured_outputs.json", "not valid JSON"),
        (None, {"json": [1]}, "structured_outputs.json", "object"),
        (None, {"json_object": "yes"}, "structured_outputs.json_object", "true"),
        (None, {"structural_tag": {}}, "structured_outputs.structural_tag", "not supported"),
        (None, {"whitespace_pattern": " "}, "structured_outputs", "must hold one of"),
        (None, {"regex": "a", "disable_any_whitespace": True}, "structured_outputs", "only beside"),
        (None, {"json_object": True, "regex": "a"}, "structured_outputs", "one of"),
        ({"type": "json_object"}, {"regex": "a"}, "structured_outputs", "Leave one of them out"),
        (None, {"regex": "a" * (MAX_GRAMMAR_CHARACTERS + 1)}, "structured_outputs.regex", "too large"),
    ],
)
def test_what_is_wrong_is_said(response_format: Any, structured_outputs: Any, param: str, says: str) -> None:
    with pytest.raises(ApiError) as found:
        grammar_of(response_format, structured_outputs)
    assert (found.value.status, found.value.param) == (400, param)
    assert says in found.value.message
    assert "\n" not in found.value.message


def chained(links: int, link: Any) -> dict[str, Any]:
    definitions = {f"d{place}": link(f"#/$defs/d{place + 1}") for place in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{links}": {"type": "string"}}}


@pytest.mark.parametrize("links", [300, 5000])
def test_a_long_chain_of_definitions_is_taken_or_refused_but_ends_nothing(links: int) -> None:
    for link in (
        lambda to: {"type": "object", "properties": {"a": {"$ref": to}}},
        lambda to: {"allOf": [{"$ref": to}, {"minLength": 1}]},
    ):
        try:
            grammar_of(by_schema(chained(links, link)), None)
        except ApiError as error:
            assert links == 5000, error.message
            assert "references" in error.message


def test_a_long_chain_of_rules_ends_nothing() -> None:
    rules = "".join(f"r{place}: r{place + 1}\n" for place in range(2000))
    assert grammar_of(None, {"grammar": f'start: r0\n{rules}r2000: "a"'}) is not None
    with pytest.raises(ApiError, match="at most"):
        lark_grammar("start: r0\n" + "r: r\n" * 5000, param="structured_outputs.grammar")


def test_deep_nesting_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(150):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="nested deeper"):
        grammar_of(by_schema(schema), None)


def test_schemas_of_many_shapes_compile() -> None:
    for schema in json_schemas(40, seed=7):
        assert grammar_of(by_schema(schema, strict=True), None) is not None
