"""Seeded JSON schemas of many shapes, each with a bounded text, for which a model's answers can be judged."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_NAMES = ("name", "city", "count", "price", "tags", "kind", "address", "items", "note", "code", "active", "size")
_WORDS = ("red", "green", "blue", "small", "large", "open", "closed", "north", "south", "paper", "glass", "bread")
_PATTERNS = (r"^[A-Z]{2}-[0-9]{3}$", r"^[a-z]{3,10}$", r"^#[0-9a-f]{6}$", r"^v[0-9]\.[0-9]{1,2}$", r"^(yes|no|maybe)$")
_FORMATS = ("date", "time", "date-time", "ipv4", "uuid")
_DEEPEST = 3


def json_schemas(count: int, seed: int) -> list[Schema]:
    """`count` schemas, the same for the same seed. Each describes an object."""
    dice = random.Random(seed)
    return [_object(dice, 0) for _ in range(count)]


def _any(dice: random.Random, depth: int) -> Schema:
    kinds: list[Callable[[random.Random, int], Schema]] = [_text, _number, _choice, _flag]
    if depth < _DEEPEST:
        kinds += [_object, _array, _either]
    return dice.choice(kinds)(dice, depth)


def _object(dice: random.Random, depth: int) -> Schema:
    names = dice.sample(_NAMES, dice.randint(1, 4 - depth))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(dice, depth + 1) for name in names},
        "required": [name for name in names if dice.random() < 0.7],
        "additionalProperties": False,
    }
    if depth == 0 and dice.random() < 0.2:
        schema["$defs"] = {"part": _any(dice, 2)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
    return schema


def _array(dice: random.Random, depth: int) -> Schema:
    least = dice.randint(0, 2)
    return {"type": "array", "items": _any(dice, depth + 1), "minItems": least, "maxItems": least + dice.randint(0, 2)}


def _either(dice: random.Random, depth: int) -> Schema:
    if dice.random() < 0.5:
        return {"anyOf": [_any(dice, depth + 1), {"type": "null"}]}
    return {"anyOf": [_text(dice, depth), _number(dice, depth)]}


def _text(dice: random.Random, _depth: int) -> Schema:
    match dice.randrange(4):
        case 0:
            return {"type": "string", "pattern": dice.choice(_PATTERNS)}
        case 1:
            return {"type": "string", "format": dice.choice(_FORMATS)}
        case _:
            least = dice.randint(0, 5)
            return {"type": "string", "minLength": least, "maxLength": least + dice.randint(0, 20)}


def _number(dice: random.Random, _depth: int) -> Schema:
    least = dice.randint(-50, 50)
    match dice.randrange(4):
        case 0:
            return {"type": "integer", "minimum": least, "maximum": least + dice.randint(0, 200)}
        case 1:
            return {"type": "integer", "exclusiveMinimum": least, "maximum": least + 1000}
        case 2:
            return {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": dice.choice((2, 5, 10))}
        case _:
            return {"type": "number", "minimum": least, "maximum": least + 100}


def _choice(dice: random.Random, _depth: int) -> Schema:
    if dice.random() < 0.2:
        return {"const": dice.choice([*_WORDS, 7, True, None])}
    return {"enum": [*dice.sample(_WORDS, dice.randint(1, 4)), *dice.sample([1, 2.5, None, False], dice.randint(0, 2))]}


def _flag(_dice: random.Random, _depth: int) -> Schema:
    return {"type": "boolean"}
