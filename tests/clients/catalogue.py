"""The clients that are tried, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

CLIENTS_FOLDER = Path(__file__).parent
ROOT = CLIENTS_FOLDER.parent.parent


class Kind(StrEnum):
    """What a client runs in."""

    PYTHON = "python"
    """A virtual environment from its requirements.txt, and its client.py in it."""
    NODE = "node"
    """A folder of npm packages from its package.json, Node itself included, and its client.mjs in it."""
    OWN = "own"
    """Its run.py sees to its environment itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client: `folder` below tests/clients holds its program and the versions it is tried with."""

    name: str
    folder: str
    kind: Kind
    limit_s: float = 600.0
    """The most that all its checks may take."""

    @property
    def place(self) -> Path:
        """Where its program lies."""
        return CLIENTS_FOLDER / self.folder


_CLIENTS = (
    Client(name="openai-python", folder="openai_python", kind=Kind.PYTHON),
    Client(name="openai-node", folder="openai_node", kind=Kind.NODE),
    Client(name="langchain", folder="langchain", kind=Kind.PYTHON),
    Client(name="litellm", folder="litellm", kind=Kind.PYTHON),
    Client(name="llm", folder="llm", kind=Kind.PYTHON),
    Client(name="pydantic-ai", folder="pydantic_ai", kind=Kind.PYTHON),
    Client(name="instructor", folder="instructor", kind=Kind.PYTHON),
    Client(name="ai-sdk", folder="ai_sdk", kind=Kind.NODE),
    Client(name="lm-eval", folder="lm_eval", kind=Kind.OWN, limit_s=3600.0),
)


def chosen(names: Sequence[str]) -> tuple[Client, ...]:
    """The clients of these names, in the catalogue's order; no names: all.

    Raises:
        ValueError: a name that no client has.
    """
    known = {client.name for client in _CLIENTS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"no client {', '.join(unknown)}; there are {', '.join(client.name for client in _CLIENTS)}")
    return tuple(client for client in _CLIENTS if not names or client.name in names)
