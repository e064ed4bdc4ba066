"""Compiles the link emulator with the C compiler of this machine, once for each version of its source."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from molink_common.errors import MolinkError
from molink_common.folders import cache_folder

SOURCE = Path(__file__).with_name("tunlink.c")
_FLAGS = ("-O2", "-Wall")
_COMPILE_TIMEOUT_S = 60.0


class CannotBuild(MolinkError):
    """The emulator cannot be compiled here. The message says what to install, or what the compiler said."""


def tunlink_binary() -> Path:
    """The emulator's binary, compiled if this version of the source has not been before.

    Raises:
        CannotBuild: there is no compiler, or it refuses the source.
    """
    version = hashlib.sha256(SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
    binary = cache_folder() / "netlab" / f"tunlink-{version}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        _compile(binary)
    return binary


def _compile(binary: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotBuild(
            "the network laboratory compiles its link emulator and finds no C compiler: apt install gcc libc6-dev"
        )
    with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        fresh = Path(folder) / "tunlink"
        result = subprocess.run(
            [compiler, *_FLAGS, "-o", str(fresh), str(SOURCE)],
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
        )
        if result.returncode != 0:
            raise CannotBuild(f"{compiler} refuses {SOURCE}: {result.stderr.strip()[-500:]}")
        # two processes may compile at once; each moves a whole file into place
        fresh.replace(binary)
