"""From a reference to a model that a stage can be loaded from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, assert_never

from molink_common.errors import ModelError
from molink_common.messages import FileOffer, ModelCard
from molink_stage_worker.engine.families import Serving, family_of
from molink_stage_worker.models import demo
from molink_stage_worker.models.cache import Progress, built_once, no_progress, sha256_of
from molink_stage_worker.models.card import build_card, fingerprint_of, fingerprint_of_conversion
from molink_stage_worker.models.checkpoint import Checkpoint, read_checkpoint, read_json
from molink_stage_worker.models.config import ModelConfig
from molink_stage_worker.models.convert import RECIPE, convert_gguf
from molink_stage_worker.models.files import LocalFiles, ModelFiles
from molink_stage_worker.models.hub import connect_hub
from molink_stage_worker.models.reference import DemoModel, GgufFile, HubModel, LocalFolder, look_up, parse_reference
from molink_stage_worker.models.selection import KeyMap, map_keys, shards_for
from molink_stage_worker.models.stage_folder import assemble

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: What a gateway needs to render, tokenize and detokenize. Vocabularies of old tokenizers come as several files.
OFFERED = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SHORT = 16

Connect = Callable[[HubModel, Path], ModelFiles]
"""Opens a model on the hub, given the folder for downloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model of which everything but the weights is on this machine, and the way to the weights."""

    card: ModelCard
    folder: Path
    """Config and tokenizer; the weights too if the whole model is local."""
    _files: ModelFiles
    _offered: Mapping[str, Path]
    _checkpoint: Checkpoint
    _keys: KeyMap
    _cache: Path

    def checkpoint_for(self, first: int, last: int, progress: Progress = no_progress) -> Path:
        """A folder that transformers opens and that has at least the tensors of layers ``[first, last)``.

        Fetches the files that hold them, and no others. Safe to call again and from several processes.

        Raises:
            ModelError: a file cannot be fetched, or the cache cannot be written.
        """
        keys = self._keys.keys_for(first, last)
        if self._files.local_folder is not None:
            return self._files.local_folder
        shards = shards_for(keys, self._checkpoint.weight_map)
        sizes = self._files.sizes()
        total, done = max(1, sum(sizes[shard] for shard in shards)), 0
        found: dict[str, Path] = {}
        for shard in shards:

            def told(doing: str, share: float | None, size: int = sizes[shard], done: int = done) -> None:
                progress(doing, (done + size * (share or 0.0)) / total)

            found[shard] = self._files.fetch(shard, told)
            done += sizes[shard]
        weight_map = {key: self._checkpoint.weight_map[key] for key in keys}
        place = self._cache / "stages" / self.card.fingerprint[:_SHORT] / f"{first}-{last}"
        return _in_cache(place, {**self._offered, **found}, weight_map)

    def read_file(self, name: str, offset: int, size: int) -> bytes:
        """A piece of one of the card's `tokenizer_files`; fewer bytes only at its end.

        Raises:
            ModelError: it is none of them, or cannot be read.
        """
        path = self._offered.get(name)
        if path is None:
            raise ModelError(f"{name!r} is not among the files of {self.card.name} that are handed out")
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error


def prepare(
    reference: str,
    *,
    cache: Path,
    progress: Progress = no_progress,
    connect: Connect = connect_hub,
) -> PreparedModel:
    """The model that `reference` names: fetched and converted as far as its card needs it.

    Takes from milliseconds (a folder) to minutes (a download, a conversion). Safe to call from several processes
    with the same cache. After a crash, the next call starts anew or finds what was finished.

    Raises:
        ModelError: the model cannot be found, read or served; the message says why.
    """
    found = parse_reference(reference, on_disk=look_up(reference))
    match found:
        case DemoModel():
            return _demo(cache, progress)
        case GgufFile(file):
            return _gguf(file, cache, progress)
        case LocalFolder(folder):
            return _described(LocalFiles(folder), cache, progress)
        case HubModel():
            return _described(connect(found, cache / "hub"), cache, progress)
        case _:
            assert_never(found)


def _demo(cache: Path, progress: Progress) -> PreparedModel:
    """The download is kept until it is converted: a conversion that fails must not fetch it anew each time."""
    download = cache / "downloads" / f"demo-{demo.GGUF_SHA256[:_SHORT]}"

    def build(folder: Path, progress: Progress) -> None:
        convert_gguf(built_once(download, demo.fetch_demo, progress) / demo.GGUF_NAME, folder, progress)

    prepared = _converted(demo.NAME, demo.ALIASES, demo.GGUF_SHA256, build, cache, progress)
    shutil.rmtree(download, ignore_errors=True)
    return prepared


def _gguf(file: Path, cache: Path, progress: Progress) -> PreparedModel:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name) and not file.name.endswith("-00001-of-00001.gguf"):
        raise ModelError(f"{file.name} is one part of several; join them first: llama-gguf-split --merge")
    try:
        if file.stat().st_size == 0:
            raise ModelError(f"{file} is empty")
        checksum = sha256_of(file, lambda share: progress(f"reading {file.name}", share))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error

    def build(folder: Path, told: Progress) -> None:
        convert_gguf(file.resolve(), folder, told)

    return _converted(file.stem, (), checksum, build, cache, progress)


def _converted(
    name: str,
    aliases: tuple[str, ...],
    checksum: str,
    build: Callable[[Path, Progress], None],
    cache: Path,
    progress: Progress,
) -> PreparedModel:
    fingerprint = fingerprint_of_conversion(RECIPE, checksum)
    place = built_once(cache / "converted" / fingerprint[:_SHORT], build, progress)
    return _described(LocalFiles(place, name), cache, progress, aliases=aliases, fingerprint=fingerprint)


def _described(
    files: ModelFiles,
    cache: Path,
    progress: Progress,
    *,
    aliases: tuple[str, ...] = (),
    fingerprint: str | None = None,
) -> PreparedModel:
    """The card of a model in transformers' form, and the door to its weights."""
    progress(f"reading {files.name}", None)
    offered = {name: files.fetch(name, progress) for name in OFFERED if name in files.sizes()}
    if CONFIG not in offered:
        raise ModelError(f"{files.name} has no {CONFIG}: it is not a model in transformers' form")
    if not offered.keys() & set(_TOKENIZERS):
        raise ModelError(f"{files.name} has no tokenizer: one of {', '.join(_TOKENIZERS)} is needed")
    config = ModelConfig(read_json(offered[CONFIG]), lambda: _with_defaults(offered[CONFIG]))
    packed = family_of(SimpleNamespace(model_type=config.family)).serving is Serving.PACKED
    if config.quantization is not None:
        raise ModelError(
            f"{files.name} is quantized ({config.quantization}); served are plain float32, float16 and bfloat16 "
            "safetensors, and GGUF files"
        )
    checkpoint = read_checkpoint(files, progress)
    keys = map_keys(checkpoint.weight_map, config.number("layers"))
    identities = {} if fingerprint else {shard: files.identity(shard) for shard in checkpoint.headers}
    card = build_card(
        name=files.name,
        aliases=aliases,
        fingerprint=fingerprint or fingerprint_of(config, checkpoint, identities),
        packed=packed,
        config=config,
        checkpoint=checkpoint,
        keys=keys,
        generation=_optional_json(offered, GENERATION_CONFIG),
        tokenizer_limit=_optional_json(offered, TOKENIZER_CONFIG).get("model_max_length"),
        offers=tuple(_offer(name, path) for name, path in offered.items()),
    )
    place = cache / "stages" / card.fingerprint[:_SHORT] / "card"
    return PreparedModel(
        card=card,
        folder=files.local_folder or _in_cache(place, offered, None),
        _files=files,
        _offered=offered,
        _checkpoint=checkpoint,
        _keys=keys,
        _cache=cache,
    )


def _in_cache(place: Path, files: Mapping[str, Path], weight_map: Mapping[str, str] | None) -> Path:
    try:
        return assemble(place, files, weight_map)
    except OSError as error:
        raise ModelError(
            f"the cache {place.parent} cannot be written: {error.strerror or error}; set MOLINK_CACHE to another folder"
        ) from error


def _optional_json(offered: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json(offered[name]) if name in offered else {}


def _offer(name: str, path: Path) -> FileOffer:
    return FileOffer(name=name, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def _with_defaults(config: Path) -> dict[str, Any]:
    from transformers import AutoConfig  # noqa: PLC0415  it imports torch; most configs need no defaults

    try:
        whole: dict[str, Any] = AutoConfig.from_pretrained(config, local_files_only=True).to_dict()
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(f"{config} cannot be understood: {str(error).splitlines()[0]}") from error
    return whole
