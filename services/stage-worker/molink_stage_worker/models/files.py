"""Where a model's files come from: the narrow door that a folder and the hub both fit through."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from molink_common.errors import ModelError
from molink_stage_worker.models.cache import Progress
from molink_stage_worker.models.safetensors_header import Header, read_header

_SAMPLES = 16
_SAMPLE_BYTES = 4096


class ModelFiles(Protocol):
    """The files of one model. Every method may raise `ModelError`."""

    @property
    def name(self) -> str:
        """The model's name in the API."""

    @property
    def local_folder(self) -> Path | None:
        """The folder with all files, if there is one on this machine."""

    def sizes(self) -> Mapping[str, int]:
        """Names and bytes of the files that can be fetched."""

    def fetch(self, name: str, progress: Progress) -> Path:
        """The file on this machine, after a download where needed."""

    def header(self, shard: str) -> Header:
        """The header of a safetensors file, without fetching the file."""

    def identity(self, shard: str) -> str:
        """A text that is equal for equal contents, got without fetching the file."""


class LocalFiles:
    """The files of a folder."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self._folder = folder.resolve()
        self.name = name or self._folder.name

    @property
    def local_folder(self) -> Path | None:
        """The folder itself."""
        return self._folder

    def sizes(self) -> Mapping[str, int]:
        """Every file directly in the folder."""
        try:
            return {path.name: path.stat().st_size for path in sorted(self._folder.iterdir()) if path.is_file()}
        except OSError as error:
            raise ModelError(f"the folder {self._folder} cannot be read: {error.strerror}") from error

    def fetch(self, name: str, progress: Progress) -> Path:
        """The file where it lies."""
        path = self._folder / name
        if not path.is_file():
            raise ModelError(f"{self._folder} has no {name}")
        return path

    def header(self, shard: str) -> Header:
        """Read from the file."""
        return read_header(self._folder / shard)

    def identity(self, shard: str) -> str:
        """Size and samples spread over the file: fine-tuned weights differ everywhere."""
        return sampled_identity(self._folder / shard)


def sampled_identity(path: Path) -> str:
    """A checksum over a file's size and samples of its bytes, in time that does not grow with the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_plain_name(name: str) -> bool:
    """Whether it names a file directly in a folder, on any platform."""
    return bool(name) and name not in (".", "..") and PurePosixPath(name).name == name and not set(name) & set("\\:\0")
