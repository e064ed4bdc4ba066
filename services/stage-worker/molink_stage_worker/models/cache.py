"""Folders that are costly to make, made once: whole or not at all, by one process, and checked when found.

A folder is built beside its final place, gets a manifest with the checksum of every file as its last file, and
is then renamed. A process that dies in between leaves a working folder that the next builder removes. A found
folder counts only if every file in the manifest is there; one whose size or time differs from the manifest is
read and compared, so a file that was cut short, overwritten or copied is noticed without reading gigabytes at
every start.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from molink_common.errors import ModelError

Progress = Callable[[str, float | None], None]
"""Told what is being done and the share that is done, None where nobody knows."""

MANIFEST = "molink-manifest.json"
_LOCK_TIMEOUT_S = 1800.0
_BLOCK_BYTES = 1 << 20
_READ_BY_ALL = 0o644


def no_progress(_doing: str, _share: float | None) -> None:
    """For callers whom nobody watches."""


def sha256_of(path: Path, told: Callable[[float], None] | None = None) -> str:
    """The checksum of a file's bytes; `told` hears the share that is read."""
    digest = hashlib.sha256()
    size = max(1, path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if told is not None:
                told(min(1.0, file.tell() / size))
    return digest.hexdigest()


def built_once(
    place: Path,
    build: Callable[[Path, Progress], None],
    progress: Progress = no_progress,
    *,
    lock_timeout_s: float = _LOCK_TIMEOUT_S,
) -> Path:
    """`place`, built by `build(folder, progress)` unless a sound one is there.

    Several processes may ask at once: one builds, the others wait for it, no longer than `lock_timeout_s`.

    Raises:
        ModelError: the cache cannot be written, or another process builds for too long.
        Whatever `build` raises; nothing is left behind then.
    """
    if is_sound(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.parent / f"{place.name}.lock")
        if not _try_acquire(lock):
            progress("waiting for another process to prepare the model", None)
            lock.acquire(timeout=lock_timeout_s)
        try:
            if not is_sound(place):
                _rebuild(place, build, progress)
        finally:
            lock.release()
    except Timeout as error:
        raise ModelError(f"another process has been preparing {place} for {lock_timeout_s:g} s; stop it") from error
    except OSError as error:
        raise ModelError(
            f"the cache {place.parent} cannot be used: {error.strerror or error}; "
            "set MOLINK_CACHE to a folder that can be written and has room"
        ) from error
    return place


def _try_acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _rebuild(place: Path, build: Callable[[Path, Progress], None], progress: Progress) -> None:
    for left_behind in place.parent.glob(f"{place.name}.work-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    # not a private temporary folder: several users may share the cache, in containers for one
    work = place.parent / f"{place.name}.work-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        build(work, progress)
        _write_manifest(work)
        if place.exists():
            shutil.rmtree(place)
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(_READ_BY_ALL)
        # on the disk before the manifest speaks for it
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        found = path.stat()
        files[path.name] = {"size": found.st_size, "modified_ns": found.st_mtime_ns, "sha256": sha256_of(path)}
    with (folder / MANIFEST).open("wb") as file:
        file.write(orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())


def is_sound(place: Path) -> bool:
    """Whether a built folder is there and holds what was built."""
    try:
        files = orjson.loads((place / MANIFEST).read_bytes())["files"]
        return bool(files) and all(_is_sound_file(place / name, facts) for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_sound_file(path: Path, facts: Mapping[str, Any]) -> bool:
    found = path.stat()
    if found.st_size != facts["size"]:
        return False
    return bool(found.st_mtime_ns == facts["modified_ns"]) or sha256_of(path) == str(facts["sha256"])
