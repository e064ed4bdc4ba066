"""Stop strings across token borders. Pure.

Text is judged as if it came one character at a time: the answer ends at the first character that completes any
stop string, and everything before that stop string is the answer (of several that end there, the longest
counts; with `keeps_stop` it is part of the answer). So the result does not depend on where the pieces of text are cut.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back exactly the text that may still become a stop string."""

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._keeps_stop = keeps_stop
        self._held = ""
        self.is_met = False
        self.met: str | None = None
        """The one that was met."""

    @property
    def held(self) -> str:
        """Text that is not yet known to belong to the answer."""
        return self._held

    def feed(self, text: str) -> str:
        """Take more text; gives what surely belongs to the answer. Sets `is_met` when a stop string is complete.

        After that, further text gives nothing.
        """
        if self.is_met or not text:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        cut = self._first_stop(buffer)
        if cut is not None:
            self.is_met = True
            self._held = ""
            start, end = cut
            self.met = buffer[start:end]
            return buffer[: end if self._keeps_stop else start]
        sure = len(buffer) - self._length_held_back(buffer)
        self._held = buffer[sure:]
        return buffer[:sure]

    def flush(self) -> str:
        """The text ends here: what was held back belongs to the answer."""
        text, self._held = self._held, ""
        return text

    def _first_stop(self, buffer: str) -> tuple[int, int] | None:
        """Where the stop string that ends first begins and ends."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else (best[1], best[0])

    def _length_held_back(self, buffer: str) -> int:
        """The length of the longest end of `buffer` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
            while start >= 0 and len(buffer) - start > longest:
                if stop.startswith(buffer[start:]):
                    longest = len(buffer) - start
                    break
                start = buffer.find(stop[0], start + 1)
        return longest
