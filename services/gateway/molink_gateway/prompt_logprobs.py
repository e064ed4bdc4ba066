"""Log probabilities of a prompt's tokens: collected as they come, told as OpenAI and as vLLM do. Pure.

They come in chunks, and after a loss some come again: each place is taken once. The first token of a prompt has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from molink_common.messages import PromptLogprobs, TokenLogprob
from molink_gateway.choice import SMALLEST_LOGPROB
from molink_gateway.detokenizer import Detokenizer
from molink_gateway.tokenizer import TokenText

TextOf = Callable[[int], TokenText]


@dataclass(frozen=True, slots=True)
class _Place:
    logprob: float
    rank: int | None
    likeliest: tuple[TokenLogprob, ...]


class PromptInbox:
    """What has been told of one prompt."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = tuple(prompt)
        self._places: dict[int, _Place] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every token but the first has its log probability."""
        return len(self._places) == len(self.prompt) - 1

    def put(self, part: PromptLogprobs) -> None:
        """Some places have come, perhaps again. What lies outside the prompt is left out."""
        for number, logprob in enumerate(part.logprobs):
            place = part.start + number
            if place < len(self.prompt) and place not in self._places:
                rank = part.ranks[number] if number < len(part.ranks) else None
                likeliest = part.likeliest[number] if number < len(part.likeliest) else ()
                self._places[place] = _Place(logprob, rank, likeliest)

    def as_openai(self, *, likeliest: int, offsets: Sequence[int], text_of: TextOf) -> dict[str, list[Any]]:
        """The object `logprobs` of a completion that echoes its prompt; `offsets` says where each token begins."""
        texts = [text_of(token) for token in self.prompt]
        places = [self._places[place] for place in range(1, len(self.prompt))]
        return {
            "tokens": [text.text for text in texts],
            "token_logprobs": [None, *(_bounded(place.logprob) for place in places)],
            "top_logprobs": [
                None,
                *(
                    by_text(
                        (text, _bounded(place.logprob)),
                        ((text_of(one.token), _bounded(one.logprob)) for one in place.likeliest[:likeliest]),
                    )
                    for text, place in zip(texts[1:], places, strict=True)
                ),
            ],
            "text_offset": list(offsets),
        }

    def as_vllm(self, *, likeliest: int, text_of: TextOf) -> list[dict[str, Any] | None]:
        """The field `prompt_logprobs`: by token id, the prompt's own token first, then the likeliest."""
        told: list[dict[str, Any] | None] = [None]
        for number in range(1, len(self.prompt)):
            token, place = self.prompt[number], self._places[number]
            entry = {str(token): _vllm_entry(place.logprob, place.rank, text_of(token))}
            for rank, one in enumerate(place.likeliest[:likeliest], 1):
                if one.token != token:
                    entry[str(one.token)] = _vllm_entry(one.logprob, rank, text_of(one.token))
            told.append(entry)
        return told


def by_text(own: tuple[TokenText, float], likeliest: Iterable[tuple[TokenText, float]]) -> dict[str, float]:
    """The likeliest tokens and the one that stands there. Of several that read alike, the likeliest counts."""
    told: dict[str, float] = {}
    for text, logprob in (*likeliest, own):
        told[text.text] = max(logprob, told.get(text.text, logprob))
    return told


def joined(
    prompt: dict[str, list[Any]], answer: dict[str, list[Any]] | None, *, num_echoed: int
) -> dict[str, list[Any]]:
    """The object `logprobs` of prompt and answer; the answer's text begins `num_echoed` characters behind."""
    later = {} if answer is None else shifted(answer, num_echoed)
    return {name: [*values, *later.get(name, ())] for name, values in prompt.items()}


def shifted(answer: dict[str, list[Any]], num_characters: int) -> dict[str, list[Any]]:
    """An object `logprobs` whose text begins so many characters later."""
    return {**answer, "text_offset": [offset + num_characters for offset in answer["text_offset"]]}


def offsets_in_bytes(pieces: Sequence[bytes], text: str) -> list[int] | None:
    """Where each token begins in the text that the tokens read as, by the bytes that each of them adds to it.

    A token that begins within a character begins where that does. The text may lack what a decoder strips off the
    front. None: the bytes do not read as the text.
    """
    try:
        whole = b"".join(pieces).decode()
    except UnicodeDecodeError:
        return None
    if not whole.endswith(text):
        return None
    offsets: list[int] = []
    begun = len(text) - len(whole)
    for piece in pieces:
        goes_on = piece[:1] and _continues(piece[0])
        offsets.append(max(begun - 1 if goes_on else begun, 0))
        begun += sum(not _continues(byte) for byte in piece)
    return offsets


def _continues(byte: int) -> bool:
    """Whether it is not the first one of a character in UTF-8."""
    return byte & 0xC0 == 0x80


def offsets_in_ids(detokenizer: Detokenizer, tokens: Sequence[int], num_characters: int) -> list[int]:
    """The same to the precision of a decoder, which tells characters once they are whole: for any kind of tokenizer.

    The text has `num_characters`; `detokenizer` has not been used.
    """
    offsets: list[int] = []
    decoded = 0
    for token in tokens:
        offsets.append(min(decoded, num_characters))
        decoded += len(detokenizer.feed(token))
    return offsets


def offsets_in_text(spans: Iterable[tuple[int, int]]) -> list[int]:
    """Where each token begins in a text, by the tokenizer's own ``(first, behind the last)`` of each.

    A span may leave out a space that belongs to the token, and that of a token which no text stands for is empty: so
    a token begins where the one before it ends, unless both are of one character.
    """
    offsets: list[int] = []
    end = 0
    for first, behind in spans:
        offsets.append(min(first, end) if behind > first else end)
        end = max(end, behind)
    return offsets


def _bounded(logprob: float) -> float:
    return max(logprob, SMALLEST_LOGPROB)


def _vllm_entry(logprob: float, rank: int | None, text: TokenText) -> dict[str, Any]:
    return {"logprob": _bounded(logprob), "rank": rank, "decoded_token": text.text}
