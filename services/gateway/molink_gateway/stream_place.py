"""Where in a stream a client is: the ``id:`` of each event, and what it sends back as ``Last-Event-ID``. Pure.

``<sequence>.<tokens>`` stands at a chunk of text: 16 hex digits, and how many of the answer's tokens the client has
with this chunk (0: only what comes before the first). ``<sequence>.<tokens>.end`` stands at the chunk with the finish
reason, ``<sequence>.<tokens>.usage`` at the chunk with the token counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from molink_common.identity import SequenceId
from molink_gateway.api_errors import bad_request

_SEQUENCE = re.compile(r"[0-9a-f]{16}\Z")
_PLACE = re.compile(r"([0-9a-f]{16})\.([0-9]{1,9})(\.end|\.usage)?\Z")
_SUFFIXES = ("", ".end", ".usage")


class Part(IntEnum):
    """What a stream says one after the other."""

    TEXT = 0
    END = 1
    USAGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The last event that a client has: everything up to it is told."""

    sequence: SequenceId
    num_tokens: int
    part: Part = Part.TEXT

    def encode(self) -> str:
        """As an event's id."""
        return f"{self.sequence}.{self.num_tokens}{_SUFFIXES[self.part]}"


def parse_place(text: str) -> Place:
    """The inverse of `Place.encode`.

    Raises:
        ApiError: 400, it is no id of ours.
    """
    match = _PLACE.match(text)
    if match is None:
        raise bad_request(
            "`Last-Event-ID` must be the `id` of an event of the stream, such as `0123456789abcdef.17`.",
            param="Last-Event-ID",
            code="invalid_event_id",
        )
    sequence, num_tokens, suffix = match.groups(default="")
    return Place(sequence=sequence, num_tokens=int(num_tokens), part=Part(_SUFFIXES.index(suffix)))


def check_stream_id(text: str) -> SequenceId:
    """The id of a stream, as it stands in an address.

    Raises:
        ApiError: 400, it is none.
    """
    if not _SEQUENCE.match(text):
        raise bad_request(
            "A stream's id is 16 lower-case hex digits: the header `X-MoLink-Stream` of its answer.",
            param="stream",
            code="invalid_stream_id",
        )
    return text
