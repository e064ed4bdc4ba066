"""What a model's weights look like: which file holds which tensor, and every tensor's form."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from molink_common.errors import ModelError
from molink_stage_worker.models.cache import Progress
from molink_stage_worker.models.files import ModelFiles, is_plain_name
from molink_stage_worker.models.safetensors_header import Header, TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADERS_AT_A_TIME = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model and where they lie."""

    weight_map: Mapping[str, str]
    """Key → file."""
    headers: Mapping[str, Header]
    """File → its header."""

    def tensor(self, key: str) -> TensorInfo:
        """The form of one tensor."""
        return self.headers[self.weight_map[key]][key]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: there is none.
    """
    try:
        body = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(body, dict):
        raise ModelError(f"{path} holds no JSON object")
    return body


def read_checkpoint(files: ModelFiles, progress: Progress) -> Checkpoint:
    """The checkpoint that transformers would load: one file, else the index's.

    Raises:
        ModelError: there is none, files are missing, or they contradict the index.
    """
    sizes = files.sizes()
    if SINGLE_FILE in sizes:
        header = files.header(SINGLE_FILE)
        return Checkpoint(dict.fromkeys(header, SINGLE_FILE), {SINGLE_FILE: header})
    if INDEX not in sizes:
        raise ModelError(_no_weights(files.name, sizes))
    weight_map = parse_index(read_json(files.fetch(INDEX, progress)))
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in sizes:
            raise ModelError(f"{files.name} is not whole: {shard} is missing")
    headers: dict[str, Header] = {}
    with ThreadPoolExecutor(max_workers=_HEADERS_AT_A_TIME) as pool:
        for number, (shard, header) in enumerate(zip(shards, pool.map(files.header, shards), strict=True)):
            progress("reading the list of tensors", number / len(shards))
            headers[shard] = header
    for key, shard in weight_map.items():
        if key not in headers[shard]:
            raise ModelError(f"{files.name} is not whole: its index promises {key} in {shard}, which lacks it")
    return Checkpoint(weight_map, headers)


def parse_index(body: Mapping[str, Any]) -> dict[str, str]:
    """The index's map from key to file.

    Raises:
        ModelError: it is none, or names a file outside the model.
    """
    weight_map = body.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{INDEX} has no weight_map")
    for shard in set(weight_map.values()):
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise ModelError(f"{INDEX} names {shard!r}, which is no safetensors file beside it")
    return {str(key): shard for key, shard in weight_map.items()}


def _no_weights(name: str, sizes: Mapping[str, int]) -> str:
    other = next((one for one in sizes if one.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors"))), None)
    if other is None:
        return f"{name} has no weights: neither {SINGLE_FILE} nor {INDEX}"
    if other.endswith(".gguf"):
        return f"{name} has no safetensors; to serve {other}, give the path of that file"
    if other.endswith(".safetensors"):
        return f"{name} has {other} but neither {SINGLE_FILE} nor {INDEX}, by which transformers finds weights"
    return f"{name} has pickled weights only ({other}), which may run code when read; convert them to safetensors"
