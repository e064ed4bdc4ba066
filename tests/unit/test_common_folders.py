"""Where things that can be fetched again are kept."""

from __future__ import annotations

from pathlib import Path

from molink_common.folders import cache_folder


def test_the_users_cache_folder() -> None:
    assert cache_folder({"MOLINK_CACHE": "/c"}, "linux") == Path("/c")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}, "linux") == Path("/x/molink")
    assert cache_folder({}, "linux") == Path.home() / ".cache" / "molink"
    assert cache_folder({"XDG_CACHE_HOME": "/x"}, "darwin") == Path.home() / "Library" / "Caches" / "molink"
    assert cache_folder({"LOCALAPPDATA": "/l"}, "win32") == Path("/l/molink")
