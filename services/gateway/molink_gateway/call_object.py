"""One call as it is written: ``{"name": …, "arguments": {…}}``, a character at a time. Pure.

It is a call as soon as its function is known to be one of the request's and its arguments begin. From then on its
arguments are told as they are written. They may also be called ``parameters``, stand before the name, or be a string
that holds JSON.
"""

from __future__ import annotations

import json
from enum import Enum, auto

from molink_gateway.json_members import Members, Scan

_ARGUMENTS = ("arguments", "parameters")
_BESIDE = ("", "name", "id", "type")


class Progress(Enum):
    """What a character was for the call."""

    ON = auto()
    """It belongs to it, and there may be more."""
    END = auto()
    """It is the call's last one."""
    OVER = auto()
    """It stands behind the call, which is over."""
    NO_CALL = auto()
    """With it this cannot become a call."""
    NO_JSON = auto()
    """It cannot stand here: what came before it is no call."""


class CallObject:
    """Reads one call of one of `functions`."""

    def __init__(self, functions: frozenset[str]) -> None:
        self._functions = functions
        self._members = Members()
        self._name: str | None = None
        self._value = ""
        self._early = ""
        """Arguments that stand before the name."""
        self._is_quoted = False
        self._has_whole_arguments = False
        self._has_arguments = False
        self._new_name: str | None = None
        self._new_arguments: list[str] = []
        self.is_call = False

    def take_new(self) -> tuple[str | None, str] | None:
        """What is known of the call since this was asked before: its name, once, and a piece of its arguments."""
        if self._new_name is None and not self._new_arguments:
            return None
        new = self._new_name, "".join(self._new_arguments)
        self._new_name, self._new_arguments = None, []
        return new

    def feed(self, character: str) -> Progress:
        """Take the next character."""
        scan = self._members.feed(character)
        if scan is Scan.WRONG:
            if not self.is_call:
                return Progress.NO_JSON
            self._end()
            return Progress.OVER
        if not self._fits(character, scan):
            return Progress.NO_CALL
        if scan is not Scan.END:
            return Progress.ON
        if self._name is None:
            return Progress.NO_CALL
        self._begin()
        self._end()
        return Progress.END

    def _fits(self, character: str, scan: Scan) -> bool:
        """Whether it may still be a call."""
        key = self._members.key
        if key == "name":
            return self._read_name(character, scan)
        if key in _ARGUMENTS:
            return self._has_whole_arguments or self._read_arguments(character, scan)
        return self.is_call or key in _BESIDE

    def _read_name(self, character: str, scan: Scan) -> bool:
        if scan is Scan.VALUE:
            if not self._value and character != '"':
                return False
            self._value += character
        if not self._members.has_whole_value:
            return True
        value, self._value = self._value, ""
        if self.is_call:  # a second name
            return True
        try:
            self._name = json.loads(value)
        except ValueError:
            return False
        if self._name not in self._functions:
            return False
        if self._early:
            self._begin()
        return True

    def _read_arguments(self, character: str, scan: Scan) -> bool:
        if scan is Scan.VALUE:
            if not self._value:
                if character not in '{"n':  # `null` says that there are none
                    return False
                self._value, self._is_quoted = character, character == '"'
                if character == "{" and self._name is not None:
                    self._begin()
            elif self._is_quoted:
                self._value += character
            if self._value[0] == "{":
                self._tell(character)
        if self._members.has_whole_value:
            if self._is_quoted and not self._read_quoted():
                return False
            self._value, self._has_whole_arguments = "", True
        return True

    def _read_quoted(self) -> bool:
        try:
            arguments = str(json.loads(self._value))
        except ValueError:
            return False
        if self._name is not None:
            self._begin()
        self._tell(arguments.strip() or "{}")
        return True

    def _tell(self, arguments: str) -> None:
        if self.is_call:
            self._has_arguments = True
            self._new_arguments.append(arguments)
        else:
            self._early += arguments

    def _begin(self) -> None:
        if self.is_call:
            return
        self.is_call = True
        self._new_name = self._name
        if self._early:
            self._tell(self._early)

    def _end(self) -> None:
        if not self._has_arguments:
            self._tell("{}")
