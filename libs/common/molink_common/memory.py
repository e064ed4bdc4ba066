"""How a process that holds much memory asks for it, and how it keeps Python's garbage collection short.

*Large pages.* When a process is killed the kernel frees its memory first and closes its connections after that; others
hear of its end by the connection. A gigabyte in small pages takes 65 ms.

*Memory that is kept.* A step's larger tensors come and go within milliseconds. The C library would give each back to
the kernel and get it again page by page, which took a last stage 2 of 23 ms for 21 streams. A thread's own heaps, of
64 MiB each, it gives back as soon as they are empty, whatever the threshold: with 100 MB that come and go, 4,300 page
faults each time. So all threads use the main one.

*Garbage.* A full collection looks at every object of the process and lets nothing else run meanwhile. What a worker's
libraries leave behind when they are imported are some 400,000 objects that never become garbage: 0.2 s each time, in
which no stream gets a token.
"""

from __future__ import annotations

import gc
import os
import sys

_KEPT_TENSOR_BYTES = 32 * 1024**2
_KEPT_BYTES = 256 * 1024**2

MEMORY_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
    f":glibc.malloc.mmap_threshold={_KEPT_TENSOR_BYTES}:glibc.malloc.trim_threshold={_KEPT_BYTES}",
}
"""What the C library and torch read once, when they are loaded. Outside Linux it means nothing."""


def begin_again_with_memory_environment() -> None:
    """Replace this process by itself with the environment that it needs; does nothing where there is nothing to gain.

    A variable that is set already stays as it is.
    """
    missing = {name: value for name, value in MEMORY_ENVIRONMENT.items() if name not in os.environ}
    if sys.platform == "linux" and missing:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(command[0], command, {**os.environ, **missing})  # noqa: S606  this very command


def spare_what_lives() -> None:
    """Collect garbage once more, and never look again at what is alive now.

    For the end of a start-up or of a load. What is freed by its last reference, as engines are, is freed all the same;
    only a cycle of objects alive now would stay when it is dropped.
    """
    gc.collect()
    gc.freeze()


def collect_all() -> None:
    """Look for garbage among what was spared as well."""
    gc.unfreeze()
    gc.collect()
