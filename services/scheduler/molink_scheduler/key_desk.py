"""Decisions about API keys: add, revoke, tell.

A new key is confirmed once the store has it. A revoked one is not valid from the moment on at which the order came,
whether or not the store answers: what runs with it ends, and gateways hear of it at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from molink_common.messages import MAX_KEYS, ApiKey, Done, Failed
from molink_scheduler import sequence_desk, sequence_moves
from molink_scheduler.books import Books, SequencePhase
from molink_scheduler.instructions import BroadcastState, DeleteKey, Instruction, ReplyTo, SaveKey

_REVOKED = "its API key was revoked"


def add(books: Books, key: ApiKey, reply: int) -> Iterator[Instruction]:
    """Take a key in, once the store has it. The same order again is carried out again."""
    problem = _why_not(books, key)
    if problem is not None:
        yield ReplyTo(reply, Failed(message=problem))
        return
    if len(books.keys) >= MAX_KEYS and books.keys.get(key.id) is None:
        oldest = min((one for one in books.keys if one.revoked_s is not None), key=lambda one: one.revoked_s or 0)
        books.keys.drop(oldest.id)
        yield DeleteKey(oldest.id)
    books.keys.put(key)
    books.keys.replies.setdefault(key.id, []).append(reply)
    yield SaveKey(key)


def _why_not(books: Books, key: ApiKey) -> str | None:
    known = books.keys.get(key.id)
    if known is not None:
        return None if known == key else f"there is a key with the id {key.id} already"
    valid = [one for one in books.keys if one.revoked_s is None]
    problems = (
        (key.revoked_s is not None, "a key that is revoked cannot be added"),
        (
            books.store_down_s is not None,
            "the scheduler cannot reach its Redis, so no key can be added now; try again soon",
        ),
        (
            any(one.name == key.name for one in valid),
            f"there is a key with the name {key.name!r} already; choose another, or revoke that one first",
        ),
        (
            any(one.secret_sha256 == key.secret_sha256 for one in books.keys),
            "there is or was a key with this secret already",
        ),
        (len(valid) >= MAX_KEYS, f"there are {MAX_KEYS} keys already, which is the most; revoke some"),
    )
    return next((message for is_so, message in problems if is_so), None)


def revoke(books: Books, name: str, reply: int, now_s: float) -> Iterator[Instruction]:
    """Let nobody in with a key any more, and end what runs with it."""
    key = books.keys.get(name)
    if key is None:
        yield ReplyTo(reply, Failed(message=f"there is no key with the id {name!r}"))
        return
    if key.revoked_s is None:
        key = key.model_copy(update={"revoked_s": int(books.keys.utc_s(now_s))})
        books.keys.put(key)
        yield BroadcastState()
        for sequence in [one for one in books.sequences.values() if one.record.request.tenant == name]:
            if sequence.phase is SequencePhase.SAVING:
                yield from sequence_desk.cancel(books, sequence.id, _REVOKED, now_s)
            else:
                yield from sequence_moves.fail(books, sequence, _REVOKED, now_s)
    books.keys.replies.setdefault(name, []).append(reply)
    yield SaveKey(key)


def saved(books: Books, name: str) -> Iterator[Instruction]:
    """The store has a key as it is now. Gateways are told first: who is told that a key is there uses it at once."""
    yield BroadcastState()
    for reply in books.keys.replies.pop(name, ()):
        yield ReplyTo(reply, Done())
