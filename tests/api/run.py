"""schemathesis against the gateway's own OpenAPI document, on a real system: `make test-api`.

    python -m tests.api.run                                     five minutes, on a system started for it
    python -m tests.api.run --seconds 60 --seed 7               a minute; the same requests again
    python -m tests.api.run --base-url http://127.0.0.1:8000    on a system that runs already; --api-key

No answer may be a server error, and each must be as the document says: status, content type, headers, schema; what the
document forbids must be refused. The exit code is 0 only then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from bench.system import running_system

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PINS = FOLDER / "requirements.txt"

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
_GRACE_S = 60.0
"""schemathesis looks at the clock now and then, and tells at the end what it has found."""


async def main(arguments: argparse.Namespace) -> int:
    """The exit code."""
    st = prepare(arguments.cache.resolve() / "schemathesis")
    if arguments.prepare:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        async with _server(arguments, Path(folder)) as url:
            return await _try(st, url, arguments, Path(folder))


def prepare(place: Path) -> Path:
    """Make schemathesis' own environment unless it is there; its program."""
    program = place / ("Scripts/st.exe" if os.name == "nt" else "bin/st")
    mark, wanted = place / ".complete", hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()
    if not (mark.exists() and mark.read_text() == wanted):
        print(f"installing {PINS.read_text().strip()}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(place)])
        python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
        _run([*install, "--requirement", str(PINS)])
        mark.write_text(wanted)
    return program


@contextlib.asynccontextmanager
async def _server(arguments: argparse.Namespace, folder: Path) -> AsyncIterator[str]:
    """The address of the system to try: the one that was named, or one started for this run."""
    if arguments.base_url is not None:
        yield arguments.base_url.rstrip("/")
        return
    print("starting a system", flush=True)
    async with running_system(arguments.log or folder / "up.log", ["--model", "demo"]) as system:
        yield system.url


async def _try(st: Path, url: str, arguments: argparse.Namespace, folder: Path) -> int:
    """What schemathesis says of it; what it keeps for itself it keeps in `folder`."""
    command = [
        str(st),
        "run",
        f"{url}/openapi.json",
        "--url",
        url,
        "--checks",
        ",".join(CHECKS),
        "--max-time",
        str(int(arguments.seconds)),
        "--suppress-health-check",
        "all",
        "--generation-database",
        "none",
        "--request-timeout",
        "60",
        "--continue-on-failure",
    ]
    if arguments.seed is not None:
        command += ["--seed", str(arguments.seed)]
    if arguments.api_key is not None:
        command += ["--header", f"Authorization: Bearer {arguments.api_key}"]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.api.hooks", "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        return await asyncio.wait_for(process.wait(), arguments.seconds + _GRACE_S)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, timeout=900)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make test-api", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long it may take")
    parser.add_argument("--seed", type=int, help="the same requests as another run with it")
    parser.add_argument("--log", type=Path, help="where the system writes its log; none: it is not kept")
    parser.add_argument("--base-url", help="a system that runs already")
    parser.add_argument("--api-key", help="for it")
    parser.add_argument("--cache", type=Path, default=ROOT / ".clients", help="where its environment is kept")
    parser.add_argument("--prepare", action="store_true", help="only set its environment up")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(_parsed())))
