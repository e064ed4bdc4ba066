"""Ids. A sequence id is a 63-bit number on the wire and 16 hex digits everywhere a person may read it."""

from __future__ import annotations

import re
import secrets
import socket

_SEQUENCE = re.compile(r"[0-9a-f]{16}\Z")
_NOT_IN_A_SUBJECT = re.compile(r"[^A-Za-z0-9_-]+")

SequenceId = str
"""16 lower-case hex digits."""


def new_sequence_id() -> SequenceId:
    """A random id; two of them meet once in about three billion sequences."""
    return f"{secrets.randbits(63):016x}"


def sequence_number(sequence: SequenceId) -> int:
    """The number that stands for the sequence in frames.

    Raises:
        ValueError: it is not 16 lower-case hex digits.
    """
    if not _SEQUENCE.match(sequence):
        raise ValueError(f"a sequence id is 16 lower-case hex digits, not {sequence!r}")
    return int(sequence, 16)


def sequence_id(number: int) -> SequenceId:
    """The inverse of `sequence_number`."""
    return f"{number:016x}"


def subject_token(name: str) -> str:
    """A name reduced to what may stand as one token of a NATS subject."""
    return _NOT_IN_A_SUBJECT.sub("-", name).strip("-")[:48] or "unnamed"


def new_peer_id(kind: str) -> str:
    """An id for a worker or gateway process: its host's name and four random bytes."""
    return subject_token(f"{kind}-{socket.gethostname()}")[:39] + "-" + secrets.token_hex(4)
