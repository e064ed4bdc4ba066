"""Print the requirements of one service: the core's and those of its extra, one a line.

The image installs them in a layer of their own, so that a change of code, of a test or of a linter's settings
does not install torch again: this output changes only when a requirement does.

    python deploy/requirements.py pyproject.toml gateway
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def requirements_of(pyproject: dict[str, Any], extra: str) -> list[str]:
    """What `pip install` needs for the core and one extra.

    Raises:
        ValueError: there is no such extra.
    """
    project = pyproject["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    if extra not in extras:
        raise ValueError(f"no extra {extra!r} in pyproject.toml; there are {', '.join(sorted(extras))}")
    return sorted({*project["dependencies"], *extras[extra]})


def main(arguments: Sequence[str]) -> None:
    """Take the path of pyproject.toml and the extra's name."""
    path, extra = arguments
    print("\n".join(requirements_of(tomllib.loads(Path(path).read_text()), extra)))


if __name__ == "__main__":
    main(sys.argv[1:])
