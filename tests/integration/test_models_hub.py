"""Models on the hub, against a small server that speaks as much of the hub as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from molink.embedded import free_port
from molink_common.errors import ModelError
from molink_stage_worker.models import PreparedModel, prepare
from molink_stage_worker.models.files import ModelFiles
from molink_stage_worker.models.hub import connect_hub
from molink_stage_worker.models.reference import HubModel
from tests.architectures.tiny_models import NUM_LAYERS, make_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/tiny"


@dataclass
class Hub:
    """One repository in a folder; `refusal` answers everything with a status and the hub's error code."""

    folder: Path
    refusal: tuple[int, str] | None = None
    bodies: list[str] = field(default_factory=list)
    """Names of the files whose whole contents were sent."""
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def log_message(self, *_arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.hub.refusal is not None:
            self._send(self.hub.refusal[0], b"{}", {"X-Error-Code": self.hub.refusal[1], "X-Error-Message": "no"})
        elif path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            self._send(200, json.dumps(self._listing()).encode(), {})
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            self._file(path.rpartition("/")[2])
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _listing(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.hub.folder.iterdir()):
            one: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": checksum(path)[:40]}
            if path.suffix == ".safetensors":
                one["lfs"] = {"size": path.stat().st_size, "sha256": checksum(path), "pointerSize": 100}
            siblings.append(one)
        siblings.append({"rfilename": "original/consolidated.pth", "size": 1, "blobId": "0" * 40})
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def _file(self, name: str) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{checksum(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range") or ""
        if wanted.startswith("bytes="):
            first, _, last = wanted[6:].partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self._send(206, part, headers)
        else:
            if self.command == "GET":
                self.hub.bodies.append(name)
            self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    model = make_tiny_model("llama", folder)
    (folder / "model.safetensors").unlink()
    # headers longer than the first range that the client asks for would be as good; small ones keep this quick
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, and a user without a hub cache or token of their own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nobodys"))
    monkeypatch.setenv("HF_TOKEN", "")
    hub = Hub(tiny_folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def prepared(url: str, cache: Path, reference: str = REPOSITORY) -> PreparedModel:
    def connect(model: HubModel, downloads: Path) -> ModelFiles:
        return connect_hub(model, downloads, endpoint=url)

    return prepare(reference, cache=cache, connect=connect)


def unreachable() -> str:
    return f"http://127.0.0.1:{free_port()}"


def shards_among(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


def test_a_card_fetches_no_weights_and_a_stage_only_its_own(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    model = prepared(hub.url, tmp_path)
    assert model.card.name == REPOSITORY
    assert model.card.num_layers == NUM_LAYERS
    assert not shards_among(hub.bodies)
    assert (model.folder / "tokenizer.json").read_text() == "{}"
    hub.bodies.clear()
    folder = model.checkpoint_for(1, 3)
    fetched = shards_among(hub.bodies)
    assert fetched == {path.name for path in folder.glob("*.safetensors")}
    assert 0 < len(fetched) < len(list(tiny_folder.glob("*.safetensors")))
    for name in fetched:
        assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    near = prepare(str(tiny_folder), cache=tmp_path / "other").card
    assert model.card.layer_parameters == near.layer_parameters
    hub.bodies.clear()
    prepared(hub.url, tmp_path).checkpoint_for(1, 3)
    assert hub.bodies == []


def test_progress_tells_of_the_download(hub: Hub, tmp_path: Path) -> None:
    model = prepared(hub.url, tmp_path)
    told: list[tuple[str, float | None]] = []
    model.checkpoint_for(0, 2, lambda doing, share: told.append((doing, share)))
    shares = [share for _, share in told if share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(doing.startswith("downloading model-") for doing, _ in told)


def test_what_is_on_this_machine_starts_without_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # huggingface_hub tries again for half a minute before it gives up
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _delay_s: None)
    first = prepared(hub.url, tmp_path)
    first.checkpoint_for(1, 3)
    again = prepared(unreachable(), tmp_path)
    assert again.card == first.card
    assert again.checkpoint_for(1, 3) == first.checkpoint_for(1, 3)
    with pytest.raises(ModelError, match="cannot be reached"):
        again.checkpoint_for(0, 1)


def test_nothing_is_known_and_the_hub_is_away(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be reached") as raised:
        prepared(unreachable(), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, "GatedRepo"), "gated"),
        ((401, "RepoNotFound"), "no model owner/tiny"),
        ((404, "RepoNotFound"), "no model owner/tiny"),
        ((403, ""), "status 403"),
    ],
)
def test_a_refusal_says_what_would_help(hub: Hub, tmp_path: Path, refusal: tuple[int, str], said: str) -> None:
    hub.refusal = refusal
    with pytest.raises(ModelError, match=said):
        prepared(hub.url, tmp_path)


def test_another_id_and_another_revision(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the hub has no model owner/absent"):
        prepared(hub.url, tmp_path, "owner/absent")
    with pytest.raises(ModelError, match="no revision v9"):
        prepared(hub.url, tmp_path, f"{REPOSITORY}@v9")


def test_access_withdrawn_between_card_and_weights(hub: Hub, tmp_path: Path) -> None:
    model = prepared(hub.url, tmp_path)
    hub.refusal = (403, "GatedRepo")
    with pytest.raises(ModelError, match="gated"):
        model.checkpoint_for(0, 1)
