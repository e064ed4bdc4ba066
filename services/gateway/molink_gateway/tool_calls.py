"""A model's text, cut into what it says and the tools that it calls. Pure.

The text is judged as if it came one character at a time, so the result does not depend on where its pieces are cut.
What may still become a marker, or a call, is held back. A call is one as soon as its function is known to be one of
the request's and its arguments begin; until then anything that does not fit turns all of it back into text. From
then on its arguments are told as the model writes them: whole only if the model finishes them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, auto

from molink_gateway.call_formats import MARKERS, CallFormat
from molink_gateway.call_object import CallObject, Progress
from molink_gateway.json_members import Members, Scan

_MOST_NAME_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What a call grew by."""

    index: int
    name: str | None = None
    """With the call's first piece."""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """What the text grew by, and its calls."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class _At(Enum):
    TEXT = auto()
    OPENING = auto()
    """Behind a marker, or where the answer may begin with a call."""
    NAME = auto()
    ENVELOPE = auto()
    """In the object that holds name and arguments."""
    ARGUMENTS = auto()
    """In arguments whose function's name stands before them."""
    BEHIND = auto()
    """Behind a call."""


class CallReader:
    """Reads one answer. `functions` are the names that may be called."""

    def __init__(self, form: CallFormat, functions: Collection[str], *, is_parallel: bool = True) -> None:
        self._markers = MARKERS[form]
        self._functions = frozenset(functions)
        self._is_parallel = is_parallel
        self._at = _At.OPENING if self._markers.begins_answer else _At.TEXT
        self._partial = ""
        """What may become a marker."""
        self._spaces = ""
        """Told once something follows that is no call."""
        self._is_behind_call = False
        self._out: list[str] = []
        self._calls: list[CallDelta] = []
        self.num_calls = 0
        self._begin_call("")

    @property
    def has_calls(self) -> bool:
        """Whether a tool was called, even if the call was not finished."""
        return self.num_calls > 0 or self._is_call

    @property
    def is_done(self) -> bool:
        """The one call that may be made is whole: what follows is of no use."""
        return not self._is_parallel and self.num_calls > 0 and self._at in (_At.BEHIND, _At.TEXT)

    def feed(self, text: str) -> Said:
        """Take more text."""
        for character in text:
            if self.is_done:
                break
            self._take(character)
        return self._said()

    def flush(self) -> Said:
        """The text ends here."""
        if self._at is _At.TEXT:
            self._say(self._partial)
            if not self._is_behind_call:
                self._out.append(self._spaces)
            self._partial = self._spaces = ""
        elif self._at in (_At.OPENING, _At.NAME, _At.ENVELOPE) and not self._is_call:
            self._take_back()
            self._out.append(self._spaces if not self._is_behind_call else "")
            self._spaces = ""
        return self._said()

    def _said(self) -> Said:
        said = Said("".join(self._out), tuple(self._calls))
        self._out, self._calls = [], []
        return said

    def _take(self, character: str) -> None:
        match self._at:
            case _At.TEXT:
                self._in_text(character)
            case _At.OPENING:
                self._in_opening(character)
            case _At.NAME:
                self._in_name(character)
            case _At.ENVELOPE:
                self._in_envelope(character)
            case _At.ARGUMENTS:
                self._in_arguments(character)
            case _At.BEHIND:
                self._behind(character)

    def _in_text(self, character: str) -> None:
        marker = self._markers.opens
        if marker is None:
            self._say(character)
            return
        self._partial += character
        while not marker.startswith(self._partial):
            self._say(self._partial[0])
            self._partial = self._partial[1:]
        if self._partial == marker:
            self._partial = ""
            self._begin_call(marker)
            self._at = _At.OPENING

    def _say(self, text: str) -> None:
        for character in text:
            if character.isspace():
                self._spaces += character
                continue
            if not self._is_behind_call:
                self._out.append(self._spaces)
            self._out.append(character)
            self._spaces, self._is_behind_call = "", False

    def _begin_call(self, raw: str) -> None:
        self._has_bracket = False
        self._raw = raw
        """All that becomes text again if it is no call."""
        self._name = ""
        self._call = CallObject(self._functions)
        self._arguments = Members()
        self._is_call = False

    def _take_back(self, character: str = "") -> None:
        """It is no call: what was held back is text, and so is what comes."""
        raw, self._raw = self._raw, ""
        self._at = _At.TEXT
        self._say(raw)
        if character:
            self._in_text(character)

    def _in_opening(self, character: str) -> None:
        markers = self._markers
        if character == "{":
            self._at = _At.ENVELOPE
            self._in_envelope(character)
        elif character.isspace() or (markers.is_list and character == "[" and not self._has_bracket):
            self._has_bracket = self._has_bracket or character == "["
            self._raw += character
        elif not self._raw.strip() and markers.opens is not None and markers.opens.startswith(character):
            self._take_back(character)  # a marker, which text may turn into
        elif markers.has_names_outside and (character.isalnum() or character == "_"):
            self._at = _At.NAME
            self._in_name(character)
        else:
            self._take_back(character)

    def _in_name(self, character: str) -> None:
        if character != "{":
            self._raw += character
            self._name += character
            if len(self._name) > _MOST_NAME_CHARACTERS or character in '"\n':
                self._take_back()
            return
        name = self._name.split("[")[0].strip()
        if name not in self._functions:
            self._take_back(character)
            return
        self._tell(CallDelta(self.num_calls, name=name))
        self._at = _At.ARGUMENTS
        self._in_arguments(character)

    def _in_arguments(self, character: str) -> None:
        scan = self._arguments.feed(character)
        if scan is not Scan.WRONG:
            self._tell(CallDelta(self.num_calls, arguments=character))
        if scan in (Scan.WRONG, Scan.END):
            self._end_call()
        if scan is Scan.WRONG:
            self._behind(character)

    def _in_envelope(self, character: str) -> None:
        progress = self._call.feed(character)
        new = self._call.take_new()
        if new is not None:
            name, arguments = new
            self._tell(CallDelta(self.num_calls, name, arguments))
        elif not self._is_call and progress is not Progress.NO_JSON:
            self._raw += character
        match progress:
            case Progress.ON:
                return
            case Progress.NO_CALL:
                self._take_back()
            case Progress.NO_JSON:
                self._take_back(character)
            case Progress.END:
                self._end_call()
            case Progress.OVER:
                self._end_call()
                self._behind(character)

    def _tell(self, delta: CallDelta) -> None:
        """It is a call: nothing of it becomes text again."""
        self._is_call = True
        self._raw = self._spaces = ""
        self._grow(delta)

    def _grow(self, delta: CallDelta) -> None:
        if self._calls and self._calls[-1].index == delta.index:
            last = self._calls[-1]
            self._calls[-1] = replace(last, arguments=last.arguments + delta.arguments)
        else:
            self._calls.append(delta)

    def _end_call(self) -> None:
        self.num_calls += 1
        self._at = _At.BEHIND
        self._is_behind_call = True
        self._partial = ""

    def _behind(self, character: str) -> None:
        closes = self._markers.closes
        if closes is not None:
            self._partial += character
            if self._partial == closes:
                self._at, self._partial = _At.TEXT, ""
            elif not closes.startswith(self._partial):
                text, self._partial = self._partial, ""
                if len(text) == 1 and (text.isspace() or text == "}"):
                    return
                self._at = _At.TEXT
                for one in text:
                    self._take(one)
        elif character == "{" and self._markers.is_list:
            self._begin_call("")
            self._at = _At.OPENING
            self._in_opening(character)
        elif not (character.isspace() or character in ",;]}"):
            self._at = _At.TEXT
            self._in_text(character)
