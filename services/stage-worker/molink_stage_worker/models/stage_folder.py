"""A folder that transformers opens as a model although it holds only one stage's files."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import orjson

from molink_stage_worker.models.checkpoint import INDEX


def assemble(place: Path, files: Mapping[str, Path], weight_map: Mapping[str, str] | None) -> Path:
    """`place`, made of links to `files` (copies where links cannot be made) and an index of `weight_map`.

    It appears whole or not at all, and is put together anew whenever something in it differs: a few links cost
    nothing, and what they pointed to may have moved.
    """
    index = (
        None if weight_map is None else orjson.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    )
    if _is_current(place, files, index):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    work = place.parent / f"{place.name}.work-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        for name, source in files.items():
            link_or_copy(source.resolve(), work / name)
        if index is not None:
            (work / INDEX).write_bytes(index)
        _put(work, place, files, index)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def _put(work: Path, place: Path, files: Mapping[str, Path], index: bytes | None) -> None:
    try:
        if place.exists():
            shutil.rmtree(place, ignore_errors=True)
        work.rename(place)
    except OSError:
        # another worker on this machine was quicker
        if not _is_current(place, files, index):
            raise


def _is_current(place: Path, files: Mapping[str, Path], index: bytes | None) -> bool:
    wanted = {*files, *([INDEX] if index is not None else [])}
    try:
        return (
            {path.name for path in place.iterdir()} == wanted
            and (index is None or (place / INDEX).read_bytes() == index)
            and all(_is_same(place / name, source) for name, source in files.items())
        )
    except OSError:
        return False


def _is_same(found: Path, source: Path) -> bool:
    if found.is_symlink():
        return found.resolve() == source.resolve() and found.is_file()
    return found.samefile(source) or (
        found.stat().st_size == source.stat().st_size and found.stat().st_mtime_ns == source.stat().st_mtime_ns
    )


def link_or_copy(source: Path, target: Path) -> None:
    """A symbolic link, a hard link or a copy: whatever the platform lets an ordinary user make, in this order."""
    for make in (target.symlink_to, target.hardlink_to):
        try:
            make(source)
        except (OSError, NotImplementedError):
            continue
        return
    shutil.copy2(source, target)
