"""From what a request says about the form of its answer to a grammar that the tail can follow. Pure.

OpenAI's `response_format` and vLLM's `structured_outputs` become one text in llguidance's JSON form. It is compiled
here once, so that a client hears at once what is wrong with it; the stage worker that samples compiles it again.

Compiling what a stranger sent is bounded in characters, in the compiler's steps and in how deep its parts name each
other: the compiler descends on the stack, and a long enough chain would end the process. The largest grammar within
these bounds takes about half a second, so a caller on an event loop calls `grammar_of` in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from molink_common.deep_stack import call_on_deep_stack
from molink_common.sampling import MAX_GRAMMAR_CHARACTERS
from molink_gateway.api_errors import ApiError, bad_request
from molink_gateway.closed_objects import with_closed_objects
from molink_gateway.exact_formats import with_exact_formats

GUIDED_FIELDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""The names that vLLM's fields had before they were put into `structured_outputs`, and where they stand there."""

MAX_CHOICE_STRINGS = 4096
_MAX_RULES = 2048
_MAX_DEPTH = 2048
"""Levels of a schema with everything that it refers to laid end to end. The compiler takes some 16 KiB for each."""
_MAX_NESTING = 100
_WHITESPACE = r"[ \t]{1,4}|\r?\n[ \t]{0,40}"
"""Between a JSON text's parts: a gap, or one new line. Without an end, a small model may fill its answer with it."""
_LENIENT = {"lenient": True, "coerce_one_of": True}
_FORMATS = ("json", "regex", "choice", "grammar", "json_object")
_MANNERS = ("whitespace_pattern", "disable_any_whitespace")
_RESPONSE_TYPES = ("text", "json_object", "json_schema")

COMPILER_LIMITS = LLParserLimits(max_grammar_size=200_000, initial_lexer_fuel=500_000, verbose_errors=False)


def grammar_of(response_format: Any, structured_outputs: Any) -> str | None:
    """The grammar that a request's answer must follow; None: any text will do. Takes up to half a second.

    The arguments are the values of the fields as they came in JSON, None where there is none.

    Raises:
        ApiError: 400, with the field that is wrong and what would be right.
    """
    wanted = _of_response_format(response_format)
    other = _of_structured_outputs(structured_outputs)
    if wanted is not None and other is not None:
        raise bad_request(
            "`response_format` and `structured_outputs` both ask for a form of the answer. Leave one of them out.",
            param="structured_outputs",
        )
    return wanted if other is None else other


def json_schema_grammar(schema: Any, *, param: str, strict: bool = True, manners: dict[str, Any] | None = None) -> str:
    """The grammar of the JSON texts that a schema allows.

    Strict: what the schema says and the grammar could not hold to is an error. Otherwise it is left out of account.

    Raises:
        ApiError: 400, with `param`.
    """
    text = unchecked_json_schema_grammar(schema, param=param, strict=strict, manners=manners)
    return _compiled(text, "the JSON schema", param)


def unchecked_json_schema_grammar(
    schema: Any, *, param: str, strict: bool = True, manners: dict[str, Any] | None = None
) -> str:
    """The same, not compiled yet, which is safe to do: for a larger grammar that this becomes a part of.

    Raises:
        ApiError: 400, the schema is too deep or too large.
    """
    if not isinstance(schema, dict):
        raise bad_request(f"`{param}` must hold a JSON schema, which is an object.", param=param)
    _check_schema_depth(schema, param)
    options: Any = {"whitespace_pattern": _WHITESPACE} | (manners or {}) | ({} if strict else _LENIENT)
    exact = orjson.dumps(with_exact_formats(with_closed_objects(schema))).decode()
    return _within_limit(LLMatcher.grammar_from_json_schema(exact, None, options), param)


def lark_grammar(lark: str, *, param: str) -> str:
    """The grammar that a text in llguidance's dialect of Lark describes; it may hold schemas as ``%json {…}``.

    Raises:
        ApiError: 400, with `param`.
    """
    rules = lark.count(":")
    if rules > _MAX_RULES:
        raise bad_request(f"`{param}` has {rules} colons; a grammar may have at most {_MAX_RULES}.", param=param)
    return _compiled(_in_json(lark, param), "the grammar", param)


def _of_response_format(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad_request("`response_format` must be an object with a `type`.", param="response_format")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_schema_grammar({"type": "object"}, param="response_format")
    if kind != "json_schema":
        raise bad_request(
            f"`response_format.type` must be one of {_listed(_RESPONSE_TYPES)}, but it is {_shown(kind)}.",
            param="response_format.type",
        )
    asked = value.get("json_schema")
    if not isinstance(asked, dict):
        raise bad_request(
            "`response_format.json_schema` must be an object with `name` and `schema`.",
            param="response_format.json_schema",
        )
    strict = asked.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise bad_request(
            f"`response_format.json_schema.strict` must be true or false, but it is {_shown(strict)}.",
            param="response_format.json_schema.strict",
        )
    schema = asked.get("schema")
    return json_schema_grammar(
        {"type": "object"} if schema is None else schema,
        param="response_format.json_schema.schema",
        strict=bool(strict),
    )


def _of_structured_outputs(value: Any) -> str | None:
    field = "structured_outputs"
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad_request(f"`{field}` must be an object with one of {_listed(_FORMATS)}.", param=field)
    given = {name: one for name, one in value.items() if one is not None and one is not False}
    unknown = given.keys() - {*_FORMATS, *_MANNERS}
    if unknown:
        name = min(unknown)
        raise bad_request(
            f"`{field}.{name[:40]}` is not supported; known are {_listed(_FORMATS + _MANNERS)}.",
            param=f"{field}.{name[:40]}",
            code="unsupported",
        )
    formats = [name for name in _FORMATS if name in given]
    if len(formats) == 1:
        return _of_format(formats[0], given)
    if given:
        but = f", but holds {_listed(formats)}" if formats else ""
        raise bad_request(f"`{field}` must hold one of {_listed(_FORMATS)}{but}.", param=field)
    return None


def _of_format(kind: str, given: dict[str, Any]) -> str:
    param, asked = f"structured_outputs.{kind}", given[kind]
    manners = _json_manners(given)
    if manners and kind not in ("json", "json_object"):
        raise bad_request(
            f"`structured_outputs` may hold {_listed(_MANNERS)} only beside `json` or `json_object`.",
            param="structured_outputs",
        )
    match kind:
        case "json":
            return json_schema_grammar(_schema_in(asked, param), param=param, manners=manners)
        case "json_object":
            if asked is not True:
                raise bad_request(f"`{param}` must be true, but it is {_shown(asked)}.", param=param)
            return json_schema_grammar({"type": "object"}, param=param, manners=manners)
        case "regex":
            return _of_regex(_text_in(asked, param), param)
        case "choice":
            return _of_choice(asked, param)
        case _:
            return _of_grammar(_text_in(asked, param), param)


def _json_manners(given: dict[str, Any]) -> dict[str, Any]:
    """How the JSON text is written, in llguidance's words."""
    manners: dict[str, Any] = {}
    if "whitespace_pattern" in given:
        param = "structured_outputs.whitespace_pattern"
        manners["whitespace_pattern"] = _text_in(given["whitespace_pattern"], param)
    if given.get("disable_any_whitespace"):
        # the separators stay what they are written without: a comma and a colon
        manners = {"whitespace_flexible": False, "whitespace_pattern": None}
    return manners


def _schema_in(asked: Any, param: str) -> Any:
    if not isinstance(asked, str):
        return asked
    try:
        return orjson.loads(asked)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"`{param}` is a text that is not valid JSON: {error}.", param=param) from error


def _of_regex(regex: str, param: str) -> str:
    _within_limit(regex, param)
    return _compiled(LLMatcher.grammar_from_regex(regex), "the regular expression", param)


def _of_choice(asked: Any, param: str) -> str:
    if not isinstance(asked, list) or not asked or not all(isinstance(one, str) and one for one in asked):
        raise bad_request(f"`{param}` must be a list of at least one string, none of them empty.", param=param)
    if len(asked) > MAX_CHOICE_STRINGS:
        raise bad_request(
            f"`{param}` must hold at most {MAX_CHOICE_STRINGS} strings, but holds {len(asked)}.", param=param
        )
    lark = "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in dict.fromkeys(asked))
    return _compiled(_in_json(lark, param), "the list of choices", param)


def _of_grammar(text: str, param: str) -> str:
    _within_limit(text, param)
    try:
        lark = any_to_lark(text)
    except Exception as error:  # a parser of other people's texts, which says only in words what it may raise
        raise bad_request(f"`{param}` cannot be read: {_first_lines(str(error))}", param=param) from error
    return lark_grammar(lark, param=param)


def _in_json(lark: str, param: str) -> str:
    return _within_limit(orjson.dumps({"grammars": [{"lark_grammar": lark}]}).decode(), param)


def _text_in(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad_request(f"`{param}` must be a text that is not empty, but it is {_shown(value)}.", param=param)
    return value


def _within_limit(text: str, param: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise bad_request(
            f"`{param}` is too large: {len(text)} characters, where at most {MAX_GRAMMAR_CHARACTERS} are possible.",
            param=param,
        )
    return text


def _compiled(text: str, what: str, param: str) -> str:
    said = compiler_says(text)
    if said is not None:
        raise _complaint(said, what, param)
    return text


def compiler_says(text: str) -> str | None:
    """What is wrong with a grammar, in one line; None: nothing is."""
    is_wrong, complaints = call_on_deep_stack(
        lambda: LLMatcher.validate_grammar_with_warnings(text, limits=COMPILER_LIMITS)
    )
    return _first_lines(complaints[0]) if is_wrong else None


def _complaint(said: str, what: str, param: str) -> ApiError:
    if "Unimplemented keys" in said or "Unknown format" in said or "oneOf constraints are not supported" in said:
        advice = (
            " Leave it out, or set `strict` to false to have it ignored."
            if param.startswith("response_format")
            else " Leave it out."
        )
        return bad_request(
            f"`{param}`: {what} asks for what is not supported: {said}.{advice}", param=param, code="unsupported"
        )
    return bad_request(f"`{param}`: {what} is not valid: {said}.", param=param)


def _first_lines(said: str) -> str:
    """The compiler's complaint as one line: it points at places with lines of spaces and carets."""
    lines = [line.strip() for line in said.splitlines()]
    text = " ".join(line for line in lines if line.strip("^ "))
    return (text if len(text) <= 300 else text[:299] + "…").rstrip(".")


def _check_schema_depth(schema: dict[str, Any], param: str) -> None:
    """Refuse what would make the compiler descend too far: nesting, and chains of references."""
    nesting = 0
    level: list[Any] = [schema]
    references: set[str] = set()
    while level:
        nesting += 1
        if nesting > _MAX_NESTING:
            raise bad_request(f"`{param}` is nested deeper than {_MAX_NESTING} levels.", param=param)
        references |= {
            one[key]
            for one in level
            if isinstance(one, dict)
            for key in ("$ref", "$dynamicRef", "$recursiveRef")
            if isinstance(one.get(key), str)
        }
        level = [inner for one in level for inner in _parts(one)]
    if len(references) * nesting > _MAX_DEPTH:
        raise bad_request(
            f"`{param}` has {len(references)} references with up to {nesting} levels each, which is more than can be "
            "followed. Use fewer definitions, or nest them less.",
            param=param,
        )


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
