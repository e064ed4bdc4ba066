"""What a model reference means. Pure: what lies on the disk under that name is an argument.

A reference is one of
    demo                       the small instruct model that comes through pip
    FOLDER                     a folder in transformers' form: config.json, tokenizer, safetensors
    FILE.gguf                  a GGUF file
    owner/name[@revision]      a model on the hub

What exists on the disk wins over the hub; ``./demo`` is a folder even though ``demo`` is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from molink_common.errors import ModelError

DEMO = "demo"
_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_WHAT_IS_RIGHT = f"give {DEMO}, a folder with safetensors, a .gguf file, or a hub id such as owner/name"


class OnDisk(StrEnum):
    """What has a given path."""

    NOTHING = "nothing"
    FILE = "file"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class DemoModel:
    """The model for a first try."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder that holds a whole model."""

    folder: Path


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model in one GGUF file."""

    file: Path


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub, at a branch, tag or commit."""

    repository: str
    revision: str | None = None


Reference = DemoModel | LocalFolder | GgufFile | HubModel


def path_of(text: str) -> Path:
    """The path that a reference would be, with ``~`` expanded."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def look_up(text: str) -> OnDisk:
    """What the disk has under that name."""
    path = path_of(text)
    try:
        if path.is_dir():
            return OnDisk.FOLDER
        return OnDisk.FILE if path.exists() else OnDisk.NOTHING
    except (OSError, ValueError):
        return OnDisk.NOTHING


def parse_reference(text: str, *, on_disk: OnDisk) -> Reference:
    """The model that `text` names.

    Raises:
        ModelError: it names none; the message says what is wrong and what would be right.
    """
    if not text.strip():
        raise ModelError(f"the model's name is empty: {_WHAT_IS_RIGHT}")
    if text == DEMO:
        return DemoModel()
    if on_disk is OnDisk.FOLDER:
        return LocalFolder(path_of(text))
    if on_disk is OnDisk.FILE:
        return _file(text)
    if _looks_like_a_path(text):
        raise ModelError(f"there is no file or folder {text} on this machine")
    return _hub_model(text)


def _file(text: str) -> GgufFile:
    path = path_of(text)
    if path.suffix.lower() == ".gguf":
        return GgufFile(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{text} holds weights only; give the folder with its config.json: {path.parent}")
    raise ModelError(f"{text} is a file of a kind that cannot be served: {_WHAT_IS_RIGHT}")


def _looks_like_a_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~", "\\"))
        or "\\" in text
        or text.lower().endswith((".gguf", ".safetensors"))
        or bool(re.match(r"[A-Za-z]:[\\/]", text))
        or text.endswith("/")
    )


def _hub_model(text: str) -> HubModel:
    if "://" in text:
        raise ModelError(f"{text} is an address; give the id alone, as in owner/name")
    repository, at, revision = text.partition("@")
    owner, slash, name = repository.partition("/")
    if not slash:
        raise ModelError(f"{text!r} is no model and no file on this machine: {_WHAT_IS_RIGHT}")
    for part in (owner, name):
        if not _HUB_PART.fullmatch(part) or "--" in part or ".." in part:
            raise ModelError(f"{text!r} is no hub id: {part!r} cannot stand in owner/name")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelError(f"{text!r}: {revision!r} is no revision; give a branch, tag or commit after @")
    return HubModel(repository, revision if at else None)
