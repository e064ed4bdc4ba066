from pathlib import Path

import pytest

from molink_common.errors import ModelError
from molink_stage_worker.models.reference import (
    DemoModel,
    GgufFile,
    HubModel,
    LocalFolder,
    OnDisk,
    look_up,
    parse_reference,
)


@pytest.mark.parametrize(
    ("text", "on_disk", "meant"),
    [
        ("demo", OnDisk.NOTHING, DemoModel()),
        ("demo", OnDisk.FOLDER, DemoModel()),
        ("./demo", OnDisk.FOLDER, LocalFolder(Path("./demo"))),
        ("/models/x", OnDisk.FOLDER, LocalFolder(Path("/models/x"))),
        ("owner/name", OnDisk.FOLDER, LocalFolder(Path("owner/name"))),
        ("x.Q4_1.GGUF", OnDisk.FILE, GgufFile(Path("x.Q4_1.GGUF"))),
        ("owner/name", OnDisk.NOTHING, HubModel("owner/name")),
        ("Qwen/Qwen2.5-0.5B-Instruct@v1.0", OnDisk.NOTHING, HubModel("Qwen/Qwen2.5-0.5B-Instruct", "v1.0")),
        ("a/b@refs/pr/1", OnDisk.NOTHING, HubModel("a/b", "refs/pr/1")),
    ],
)
def test_what_a_reference_means(text: str, on_disk: OnDisk, meant: object) -> None:
    assert parse_reference(text, on_disk=on_disk) == meant


@pytest.mark.parametrize(
    ("text", "on_disk", "said"),
    [
        ("", OnDisk.NOTHING, "empty"),
        ("  ", OnDisk.NOTHING, "empty"),
        ("gpt5", OnDisk.NOTHING, "owner/name"),
        ("./absent", OnDisk.NOTHING, "no file or folder"),
        ("~/absent", OnDisk.NOTHING, "no file or folder"),
        ("C:\\models\\x", OnDisk.NOTHING, "no file or folder"),
        ("owner/model.gguf", OnDisk.NOTHING, "no file or folder"),
        ("models/", OnDisk.NOTHING, "no file or folder"),
        ("/m/model.safetensors", OnDisk.FILE, "config.json: /m"),
        ("/m/pytorch_model.bin", OnDisk.FILE, "cannot be served"),
        ("https://huggingface.co/a/b", OnDisk.NOTHING, "owner/name"),
        ("a/b/c", OnDisk.NOTHING, "no hub id"),
        ("a/..", OnDisk.NOTHING, "no hub id"),
        ("a/b@", OnDisk.NOTHING, "no revision"),
        ("a/b@../../x", OnDisk.NOTHING, "no revision"),
        ("a/b c", OnDisk.NOTHING, "no hub id"),
        ("a/b\n", OnDisk.NOTHING, "no hub id"),
    ],
)
def test_an_error_says_what_would_be_right(text: str, on_disk: OnDisk, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        parse_reference(text, on_disk=on_disk)


def test_what_lies_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert look_up(str(tmp_path)) is OnDisk.FOLDER
    assert look_up(str(tmp_path / "file")) is OnDisk.FILE
    assert look_up(str(tmp_path / "nothing")) is OnDisk.NOTHING
    assert look_up("nul\0byte") is OnDisk.NOTHING
    assert look_up("x" * 10_000) is OnDisk.NOTHING
