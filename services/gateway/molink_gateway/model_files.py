"""Fetching the tokenizer's files from a worker, checked against the model card."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from molink_common import subjects
from molink_common.bus import Bus
from molink_common.errors import BusError, ModelError, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import Failed, FetchFile, FileChunk, FileOffer

log = get_logger("gateway.files")

PIECE_BYTES = 64 * 1024
"""Less than a second on a link of 1 Mbit/s, on which tokens travel, too."""
MAX_FILES = 16
MAX_FILE_BYTES = 256 * 1024 * 1024
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.(json|jinja|txt|model)\Z")


def check_offers(offers: tuple[FileOffer, ...]) -> None:
    """Refuse what must not be written to a folder of ours.

    Raises:
        ModelError: no files, too many, too large, or a name that is not a plain data file's.
    """
    if not offers:
        raise ModelError("the model card names no tokenizer files")
    if len(offers) > MAX_FILES:
        raise ModelError(f"the model card names {len(offers)} tokenizer files; at most {MAX_FILES} are fetched")
    for offer in offers:
        if not _PLAIN_NAME.match(offer.name):
            raise ModelError(f"the tokenizer file {offer.name[:80]!r} is no plain .json, .jinja, .txt or .model file")
        if offer.size_bytes > MAX_FILE_BYTES:
            raise ModelError(f"the tokenizer file {offer.name} has {offer.size_bytes} bytes; the limit is 256 MiB")


async def fetch_files(
    bus: Bus, workers: tuple[str, ...], offers: tuple[FileOffer, ...], folder: Path, *, timeout_s: float = 10.0
) -> None:
    """Write every offered file to `folder`, from the first worker that can give it whole.

    Raises:
        ModelError: no worker could, with what the last one said; or see `check_offers`.
    """
    check_offers(offers)
    problem = "there is no worker to ask"
    for worker in workers:
        try:
            for offer in offers:
                data = await _fetch(bus, worker, offer, timeout_s)
                (folder / offer.name).write_bytes(data)
        except (BusError, ProtocolError, ModelError) as error:
            problem = f"{worker}: {error}"
            log.debug("tokenizer files not fetched", worker=worker, problem=str(error))
        else:
            return
    raise ModelError(f"the tokenizer's files cannot be fetched: {problem}")


async def _fetch(bus: Bus, worker: str, offer: FileOffer, timeout_s: float) -> bytes:
    data = bytearray()
    while len(data) < offer.size_bytes:
        size_bytes = min(PIECE_BYTES, offer.size_bytes - len(data))
        question = FetchFile(name=offer.name, offset_bytes=len(data), size_bytes=size_bytes)
        answer = await bus.ask(subjects.files(worker), question, FileChunk, Failed, timeout_s=timeout_s)
        if not isinstance(answer, FileChunk):
            raise ModelError(answer.message if isinstance(answer, Failed) else f"{offer.name}: no file came")
        if not answer.data or len(answer.data) > size_bytes:
            raise ModelError(f"{offer.name}: {len(answer.data)} bytes where {size_bytes} were asked for")
        data += answer.data
    if hashlib.sha256(data).hexdigest() != offer.sha256.lower():
        raise ModelError(f"{offer.name}: the bytes do not have the checksum of the model card")
    return bytes(data)
