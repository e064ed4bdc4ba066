"""Models on the Hugging Face hub, file by file.

Downloads, tokens (``HF_TOKEN``) and mirrors (``HF_ENDPOINT``) are huggingface_hub's business. This module adds
what is ours: it never fetches more than it is asked for, it remembers listings and headers so that a worker with
its own files starts while the hub is away, and it turns every failure into one sentence.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from molink_common.errors import ModelError
from molink_stage_worker.models.cache import Progress
from molink_stage_worker.models.files import ModelFiles, is_plain_name
from molink_stage_worker.models.reference import HubModel
from molink_stage_worker.models.safetensors_header import Header, TensorInfo, read_header

_LISTING_TIMEOUT_S = 30.0
_REVISION = "main"


class HubUnreachable(ModelError):
    """No answer from the hub, or none that helps; what was fetched before may still do."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit."""

    commit: str
    sizes: Mapping[str, int]
    identities: Mapping[str, str]
    """File → the checksum that the hub gives it."""


def connect_hub(model: HubModel, downloads: Path, *, endpoint: str | None = None) -> ModelFiles:
    """The files of a model on the hub: as listed now, or as listed last time if the hub cannot be reached.

    Raises:
        ModelError: there is no such model or revision, access is refused, or nothing is known of it offline.
    """
    remembered = downloads / "listings" / f"{model.repository}@{model.revision or _REVISION}".replace("/", "--")
    try:
        listing = _ask_for_listing(model, endpoint)
    except HubUnreachable:
        earlier = _recall(remembered)
        if earlier is None:
            raise
        listing = earlier
    else:
        _remember(remembered, listing)
    return HubFiles(model.repository, listing, downloads, endpoint=endpoint)


class HubFiles:
    """The files of one repository at one commit."""

    def __init__(self, repository: str, listing: Listing, downloads: Path, *, endpoint: str | None = None) -> None:
        self.name = repository
        self._listing = listing
        self._downloads = downloads
        self._endpoint = endpoint

    @property
    def local_folder(self) -> Path | None:
        """None: a worker holds some of the files only."""
        return None

    def sizes(self) -> Mapping[str, int]:
        """As the hub lists them."""
        return self._listing.sizes

    def fetch(self, name: str, progress: Progress) -> Path:
        """From this cache, from the user's own hub cache, or from the hub."""
        import huggingface_hub  # noqa: PLC0415  only models on the hub need it

        for folder in (self._downloads, None):
            found = huggingface_hub.try_to_load_from_cache(
                self.name, name, cache_dir=folder, revision=self._listing.commit
            )
            if isinstance(found, str):
                return Path(found)
        doing = f"downloading {name}"
        progress(doing, 0.0)
        try:
            path = huggingface_hub.hf_hub_download(
                self.name,
                name,
                revision=self._listing.commit,
                cache_dir=self._downloads,
                endpoint=self._endpoint,
                tqdm_class=_bar_that_tells(lambda share: progress(doing, share)),
            )
        # the library's HTTP layer has its own errors, and they have changed with its versions
        except Exception as error:
            raise _explained(error, self.name, name) from error
        progress(doing, 1.0)
        return Path(path)

    def header(self, shard: str) -> Header:
        """Read from the first bytes of the remote file, once; remembered from then on."""
        remembered = self._downloads / "headers" / self.name.replace("/", "--") / self._listing.commit / shard
        known = _read_json(remembered)
        if known is None:
            known = self._ask_for_header(shard)
            _write_json(remembered, known)
        return {key: TensorInfo(one[0], tuple(one[1]), one[2], one[3]) for key, one in known.items()}

    def identity(self, shard: str) -> str:
        """The checksum that the hub gives the file."""
        return self._listing.identities[shard]

    def _ask_for_header(self, shard: str) -> dict[str, Any]:
        import huggingface_hub  # noqa: PLC0415

        found = huggingface_hub.try_to_load_from_cache(
            self.name, shard, cache_dir=self._downloads, revision=self._listing.commit
        )
        if isinstance(found, str):
            header = read_header(Path(found))
            return {key: [one.dtype, one.shape, one.start, one.end] for key, one in header.items()}
        try:
            parsed = huggingface_hub.HfApi(endpoint=self._endpoint).parse_safetensors_file_metadata(
                self.name, shard, revision=self._listing.commit
            )
        except Exception as error:
            raise _explained(error, self.name, shard) from error
        return {key: [one.dtype, one.shape, *one.data_offsets] for key, one in parsed.tensors.items()}


def _ask_for_listing(model: HubModel, endpoint: str | None) -> Listing:
    import huggingface_hub  # noqa: PLC0415

    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(
            model.repository, revision=model.revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S
        )
    except Exception as error:
        raise _explained(error, model.repository, model.revision) from error
    plain = [one for one in info.siblings or [] if is_plain_name(one.rfilename)]
    return Listing(
        commit=str(info.sha),
        sizes={one.rfilename: one.size or 0 for one in plain},
        identities={one.rfilename: one.lfs.sha256 if one.lfs else str(one.blob_id) for one in plain},
    )


def _explained(error: Exception, repository: str, what: str | None) -> ModelError:  # noqa: PLR0911  one a failure
    """What a failure means to the person who gave the id, and what would help."""
    from huggingface_hub import errors  # noqa: PLC0415

    match error:
        case ModelError():
            return error
        case errors.GatedRepoError():
            return ModelError(f"{repository} is gated: accept its terms on the hub and set HF_TOKEN to your token")
        case errors.RepositoryNotFoundError():
            return ModelError(f"the hub has no model {repository}, or it is private: then set HF_TOKEN to a token")
        case errors.RevisionNotFoundError():
            return ModelError(f"{repository} has no revision {what or _REVISION}")
        case errors.RemoteEntryNotFoundError():
            return ModelError(f"{repository} has no file {what}")
        case errors.HFValidationError() | errors.SafetensorsParsingError():
            return ModelError(f"{repository}: {_first_line(error)}")
        case errors.OfflineModeIsEnabled():
            return HubUnreachable(f"{repository} is not whole on this machine and HF_HUB_OFFLINE forbids to fetch it")
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            return _unreachable(repository, error.__cause__)
        case errors.HfHubHTTPError() if error.response is not None and error.response.status_code < 500:
            return ModelError(f"the hub refuses {repository}: status {error.response.status_code}")
        case OSError() if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            return ModelError(f"{repository} cannot be stored: {error.strerror}; MOLINK_CACHE names another folder")
    return _unreachable(repository, error)


def _unreachable(repository: str, error: BaseException) -> HubUnreachable:
    return HubUnreachable(
        f"{repository} is not on this machine and the hub cannot be reached ({_first_line(error)}); "
        "check the network, or give a folder, a .gguf file or demo"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _bar_that_tells(told: Any) -> Any:
    """A progress bar that draws nothing and tells the share instead."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415

    class Bar(tqdm):  # type: ignore[misc, unused-ignore]  # the library has no types
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            settings["disable"] = True
            super().__init__(*arguments, **settings)
            self._seen = float(settings.get("initial") or 0)
            self._of = float(settings.get("total") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self._seen += n or 0
            if self._of > 0:
                told(min(1.0, self._seen / self._of))
            return None

    return Bar


def _remember(place: Path, listing: Listing) -> None:
    body = {"commit": listing.commit, "sizes": listing.sizes, "identities": listing.identities}
    _write_json(place, body)


def _recall(place: Path) -> Listing | None:
    body = _read_json(place)
    return None if body is None else Listing(body["commit"], body["sizes"], body["identities"])


def _read_json(place: Path) -> dict[str, Any] | None:
    try:
        body = orjson.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def _write_json(place: Path, body: Mapping[str, Any]) -> None:
    """Whole or not at all: several workers on a machine may write the same."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=place.parent)
        with os.fdopen(number, "wb") as file:
            file.write(orjson.dumps(body))
        Path(name).replace(place)
    except OSError as error:
        raise ModelError(f"{place.parent} cannot be written: {error.strerror}; set MOLINK_CACHE") from error
