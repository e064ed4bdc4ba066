"""Each client's own environment: a virtual environment or a folder of npm packages, made once and kept.

An environment is made again when the file that pins its versions changes. Nothing is installed anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.clients.catalogue import CLIENTS_FOLDER, Client, Kind

_INSTALL_TIMEOUT_S = 900.0
_COMPLETE = ".complete"


class NoEnvironment(Exception):
    """A client cannot be tried here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Environments:
    """The folder that holds all of them."""

    folder: Path

    def prepare(self, client: Client) -> tuple[str, ...]:
        """Make the client's environment unless it is there; the command that runs its program.

        Raises:
            NoEnvironment: a tool is missing, or what is pinned could not be installed.
        """
        match client.kind:
            case Kind.PYTHON:
                return self._prepare_python(client)
            case Kind.NODE:
                return self._prepare_node(client)
            case Kind.OWN:
                program = client.place / "run.py"
                if not program.exists():
                    raise NoEnvironment(f"{program} is missing")
                return (sys.executable, str(program))

    def _prepare_python(self, client: Client) -> tuple[str, ...]:
        place, pins = self.folder / client.name, client.place / "requirements.txt"
        python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not _is_complete(place, pins):
            _announce(client)
            shutil.rmtree(place, ignore_errors=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(place)])
            # not compiled: most of what is installed is never imported
            install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
            _run([*install, "--no-warn-script-location", "--requirement", str(pins)])
            _complete(place, pins)
        return (str(python), "-m", f"tests.clients.{client.folder}.client")

    def _prepare_node(self, client: Client) -> tuple[str, ...]:
        place, pins = self.folder / client.name, client.place / "package.json"
        if not _is_complete(place, pins):
            npm = shutil.which("npm")
            if npm is None:
                raise NoEnvironment("npm is not installed; on Debian and Ubuntu: apt install npm")
            _announce(client)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            shutil.copy(pins, place)
            _run([npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"], folder=place)
            _complete(place, pins)
        # a module's imports are looked up from where it lies
        shutil.copy(CLIENTS_FOLDER / "reporting.mjs", self.folder)
        shutil.copy(client.place / "client.mjs", place)
        return (str(place / "node_modules" / ".bin" / "node"), str(place / "client.mjs"))


def version_of(client: Client) -> str:
    """What is pinned first: the client itself."""
    match client.kind:
        case Kind.PYTHON | Kind.OWN:
            lines = (client.place / "requirements.txt").read_text().splitlines()
            return next(line for line in lines if line and not line.startswith("#"))
        case Kind.NODE:
            packages = json.loads((client.place / "package.json").read_text())["dependencies"]
            name, version = next(iter(packages.items()))
            return f"{name}@{version}"


def _announce(client: Client) -> None:
    print(f"{client.name}: installing {version_of(client)}", flush=True)


def _fingerprint(pins: Path) -> str:
    return hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()


def _is_complete(place: Path, pins: Path) -> bool:
    mark = place / _COMPLETE
    return mark.exists() and mark.read_text() == _fingerprint(pins)


def _complete(place: Path, pins: Path) -> None:
    (place / _COMPLETE).write_text(_fingerprint(pins))


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NoEnvironment(f"`{' '.join(command)}` took longer than {_INSTALL_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-800:]
        raise NoEnvironment(f"`{' '.join(command)}` failed: {said}")
