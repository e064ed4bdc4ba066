"""Text to token ids and back, and the chat template: transformers' tokenizer, without torch.

A model's own code is never run (`trust_remote_code` stays off), and templates run in transformers' sandbox. Only
tokenizers of the `tokenizers` library are taken: they are the ones with a fast and thread-safe encoder.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from molink_common.errors import ModelError
from molink_gateway.api_errors import bad_request
from molink_gateway.call_formats import CallFormat, format_of
from molink_gateway.detokenizer import Detokenizer

_RESERVED_VARIABLES = frozenset(
    {"messages", "conversations"} | inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters.keys()
)
"""What a client's variables for a chat template must not be named: they would replace what the gateway says."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """How one token reads by itself, for log probabilities."""

    text: str
    data: bytes


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole
        self._backend = whole.backend_tokenizer
        # the encoder changes itself when it truncates or pads, which two threads must not see
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = frozenset(whole.all_special_ids) | _special_tokens(self._backend)
        self._longest_piece_bytes = max(len(piece.encode()) for piece in self._backend.get_vocab())
        described = json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        self._is_byte_level = '"ByteLevel"' in described
        self._texts: dict[int, TokenText] = {}

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered to a prompt."""
        return bool(self._whole.chat_template)

    @property
    def call_format(self) -> CallFormat | None:
        """How the model writes calls of tools, if its chat template says so."""
        template = self._whole.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default") or ""
        return format_of(template)

    def has_token(self, text: str) -> bool:
        """Whether the vocabulary has a token of this very text."""
        return self._backend.token_to_id(text) is not None

    def unwritable(self, text: str) -> str | None:
        """The first character of a text that no tokens of the vocabulary make up. Takes a moment once."""
        return next((character for character in text if not self._writable_bytes.issuperset(character.encode())), None)

    @functools.cached_property
    def _writable_bytes(self) -> frozenset[int]:
        return frozenset(byte for token in range(self._backend.get_vocab_size()) for byte in self._bytes_of(token))

    def render(
        self,
        turns: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The messages as one prompt that ends where the assistant begins to speak, or goes on.

        `variables` are for the template; the client chooses their names.

        Raises:
            ApiError: 400, when the template does not take these messages, or there is no template.
        """
        reserved = _RESERVED_VARIABLES.intersection(variables or ())
        if reserved:
            raise bad_request(
                f"`chat_template_kwargs` must not hold {min(reserved)!r}: that is for the server to say.",
                param="chat_template_kwargs",
            )
        if not self.has_chat_template:
            raise bad_request(
                "This model has no chat template: it is a base model. Use /v1/completions with a prompt.",
                param="messages",
                code="no_chat_template",
            )
        try:
            return str(
                self._whole.apply_chat_template(
                    turns,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **(variables or {}),
                )
            )
        except (
            jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError,
            RecursionError,
        ) as error:  # fmt: skip
            raise bad_request(
                f"The model's chat template refuses these messages: {error}", param="messages", code="chat_template"
            ) from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. A rendered chat has its special tokens already."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, int]]:
        """Of each token, its first character in `text` and the one behind its last. Empty for what is not in it."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).offsets)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens, known without encoding: no token is longer than the longest."""
        return math.ceil(len(text) / self._longest_piece_bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._backend.decode(tokens, skip_special_tokens=True))

    def decode_all(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones too."""
        return str(self._backend.decode(tokens, skip_special_tokens=False))

    def detokenizer(
        self, context: Sequence[int], *, shows_special: bool = False, shown: Sequence[str] = ()
    ) -> Detokenizer:
        """For the answer to a prompt that ends in `context`. Special tokens are text where `shown` has them."""
        if shows_special:
            hidden: frozenset[int] = frozenset()
        else:
            hidden = self._special.difference(self._backend.token_to_id(text) for text in shown)
        if hidden == self._special:
            return Detokenizer(self.decode, self._special.__contains__, context)

        def decode(tokens: Sequence[int]) -> str:
            kept = [token for token in tokens if token not in hidden]
            return str(self._backend.decode(kept, skip_special_tokens=False))

        return Detokenizer(decode, hidden.__contains__, context)

    def text_of(self, token: int) -> TokenText:
        """How one token reads by itself: its bytes, and these as text with U+FFFD where they are no text."""
        known = self._texts.get(token)
        if known is None:
            data = self._bytes_of(token)
            known = self._texts[token] = TokenText(data.decode(errors="replace"), data)
        return known

    def bytes_in_text(self, token: int) -> bytes:
        """What one token adds to a text, as far as it can be known of it alone; nothing if it is special."""
        return b"" if token in self._special else self.text_of(token).data

    def _bytes_of(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose files lie in `folder`.

    Raises:
        ModelError: the files are no tokenizer that can be used here.
    """
    try:
        whole = _load(folder)
    except Exception as error:  # the libraries raise their own and bare exceptions for files they cannot read
        raise ModelError(f"the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if not getattr(whole, "is_fast", False):
        raise ModelError("the tokenizer has no tokenizer.json; convert the model with a recent transformers")
    return Tokenizer(whole)


def _load(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError):
        # tokenizer_config.json names no class that transformers knows: tokenizer.json alone says enough
        if not (folder / "tokenizer.json").is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _special_tokens(backend: Any) -> frozenset[int]:
    return frozenset(number for number, token in backend.get_added_tokens_decoder().items() if token.special)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write for the 256 bytes (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF = _byte_alphabet()
