"""Formats of a JSON schema that the grammar's compiler takes more widely than those who check the answer. Pure.

Its dates have a 29 February every year and a year 0, its times a second 60 in every minute and fractions without an
end. Dates in Python, JavaScript and the usual validators have none of it, so a pattern beside the format leaves it out.
"""

from __future__ import annotations

from typing import Any

_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
"""Of two digits, those that four divides, without 00."""
_LEAP_YEAR = f"([0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DAY = "((0[13-9]|1[0-2])-[0-9]{2}|02-([01][0-9]|2[0-8]))"
_DATE = f"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
_VALUES = ("const", "enum", "default", "examples")
"""What stands there is no schema."""


def with_exact_formats(schema: Any) -> Any:
    """The same schema with a pattern at each such format that has none. Its nesting must be bounded."""
    if isinstance(schema, list):
        return [with_exact_formats(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    exact = {key: value if key in _VALUES else with_exact_formats(value) for key, value in schema.items()}
    kind = schema.get("format")
    if isinstance(kind, str) and kind in _PATTERNS and "pattern" not in schema:
        exact["pattern"] = _PATTERNS[kind]
    return exact
