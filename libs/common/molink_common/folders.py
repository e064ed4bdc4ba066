"""The folder for everything that can be made or fetched again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """``MOLINK_CACHE``, else the platform's folder below the user's own. It need not exist yet."""
    if chosen := environment.get("MOLINK_CACHE"):
        return Path(chosen).expanduser()
    if platform == "win32":
        return Path(environment.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "molink"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "molink"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molink"
