"""Memory in large pages, for processes that hold much of it.

When a process is killed the kernel frees its memory first and closes its connections after that; others hear of its
end by the connection. A gigabyte in small pages takes 65 ms. The C library and torch read from the environment how
they are to ask for memory, once, when they are loaded. Outside Linux the variables mean nothing.
"""

from __future__ import annotations

import os
import sys

LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""What the environment of such a process holds."""


def begin_again_with_large_pages() -> None:
    """Replace this process by itself with the environment that it needs; does nothing where there is nothing to gain.

    A variable that is set already stays as it is.
    """
    missing = {name: value for name, value in LARGE_PAGES.items() if name not in os.environ}
    if sys.platform == "linux" and missing:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(command[0], command, {**os.environ, **missing})  # noqa: S606  this very command
