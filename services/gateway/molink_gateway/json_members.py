"""One JSON object as it grows: which characters belong to the value of which of its members. Pure.

Only the object's own level is strict. Within a value brackets are counted and strings are skipped: what is in there
is for whoever reads the value.
"""

from __future__ import annotations

import json
from enum import Enum, auto

_SPACE = " \t\n\r"


class Scan(Enum):
    """What a character is."""

    STRUCTURE = auto()
    """Of the object itself: a brace, a key, a comma, a space."""
    VALUE = auto()
    """Of the value of `Members.key`."""
    END = auto()
    """The brace that closes the object."""
    WRONG = auto()
    """It cannot stand here; the object is none."""


class _Expects(Enum):
    OBJECT = auto()
    KEY_OR_END = auto()
    KEY = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()
    COMMA_OR_END = auto()
    NOTHING = auto()


class Members:
    """Reads one object, a character at a time."""

    def __init__(self) -> None:
        self._expects = _Expects.OBJECT
        self._key_text = ""
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self.key = ""
        """Of the member that is read now, or was last."""
        self.has_whole_value = False
        """The value of `key` is complete with the character that was fed last (a number: before it)."""

    def feed(self, character: str) -> Scan:
        """Take the next character."""
        self.has_whole_value = False
        if self._expects is _Expects.IN_VALUE:
            return self._in_value(character)
        if self._expects is _Expects.IN_KEY:
            return self._in_key(character)
        return self._between(character)

    def _between(self, character: str) -> Scan:
        match self._expects:
            case _ if character in _SPACE:
                return Scan.STRUCTURE if self._expects is not _Expects.NOTHING else Scan.WRONG
            case _Expects.OBJECT if character == "{":
                self._expects = _Expects.KEY_OR_END
            case _Expects.KEY | _Expects.KEY_OR_END if character == '"':
                self._expects, self._key_text = _Expects.IN_KEY, '"'
            case _Expects.COLON if character == ":":
                self._expects = _Expects.VALUE
            case _Expects.COMMA_OR_END if character == ",":
                self._expects = _Expects.KEY
            case _Expects.COMMA_OR_END | _Expects.KEY_OR_END if character == "}":
                self._expects = _Expects.NOTHING
                return Scan.END
            case _Expects.VALUE if character in '{["-0123456789tfn':
                return self._begin_value(character)
            case _:
                return Scan.WRONG
        return Scan.STRUCTURE

    def _in_key(self, character: str) -> Scan:
        self._key_text += character
        if self._is_escaped or character != '"':
            self._is_escaped = character == "\\" and not self._is_escaped
            return Scan.STRUCTURE
        try:
            self.key = json.loads(self._key_text)
        except ValueError:
            return Scan.WRONG
        self._expects = _Expects.COLON
        return Scan.STRUCTURE

    def _begin_value(self, character: str) -> Scan:
        self._expects = _Expects.IN_VALUE
        self._is_in_string = character == '"'
        self._is_escaped = False
        self._depth = 1 if character in "{[" else 0
        return Scan.VALUE

    def _in_value(self, character: str) -> Scan:
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_in_string = False
                self._note_end_of_value()
            return Scan.VALUE
        if self._depth == 0 and (character in _SPACE or character in ",}"):  # a number, true, false or null ends
            self._expects = _Expects.COMMA_OR_END
            scan = self._between(character)
            self.has_whole_value = True
            return scan
        if character == '"':
            if self._depth == 0:
                return Scan.WRONG
            self._is_in_string = True
        elif character in "{[":
            if self._depth == 0:
                return Scan.WRONG
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth < 0:
                return Scan.WRONG
            self._note_end_of_value()
        return Scan.VALUE

    def _note_end_of_value(self) -> None:
        if self._depth == 0:
            self._expects = _Expects.COMMA_OR_END
            self.has_whole_value = True
