"""Token by token to text, correct across UTF-8 and word borders. Pure.

A token may hold a part of a character, and how a token reads may depend on the one before it (a leading space).
So each step decodes a short window of tokens and takes what is new in it, once it does not end in the middle of
a character. The `tokenizers` library has a faster stream decoder, but it cannot be flushed at the end of an
answer and raises on some windows; at about 2 µs a token this is fast enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 5
_LONGEST_WAIT_TOKENS = 48
"""More tokens without the end of a character are no text; they are shown as they decode."""


class Detokenizer:
    """The text of one sequence. `decode` turns token ids into text, special tokens left out.

    `context` are the prompt's last tokens: a space between them and the answer is kept.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], is_special: Callable[[int], bool], context: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._is_special = is_special
        self._window = [token for token in context if not is_special(token)][-_CONTEXT_TOKENS:]
        self._num_told = len(self._window)
        self._told_text = decode(self._window) if self._window else ""

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        if self._is_special(token):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        is_waiting = text.endswith(_REPLACEMENT) and len(self._window) - self._num_told < _LONGEST_WAIT_TOKENS
        return "" if is_waiting else self._tell(text)

    def flush(self) -> str:
        """The answer ends here: what is left, with U+FFFD for a character that was not finished."""
        if len(self._window) == self._num_told:
            return ""
        return self._tell(self._decode(self._window))

    def _tell(self, text: str) -> str:
        new = text[len(self._told_text) :]
        if new or len(self._window) >= _LONGEST_WAIT_TOKENS:  # tokens without text are no context on their own
            self._window = self._window[self._num_told :]
        self._num_told = len(self._window)
        self._told_text = self._decode(self._window)
        return new
