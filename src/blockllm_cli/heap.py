"""How this process gets memory from the system: large tensors are made and freed in every update.

By default the C library of Linux maps each large tensor afresh and gives it back when it is freed, so that every update
of a run touches every page of its activations for the first time again. Kept instead, and in pages of 2 MiB, nearly all
of an update's tens of thousands of page faults go (`docs/performance.md`); the process holds what its largest update
took.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
"""Parameters of glibc's `mallopt`."""

_MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")

_ONEDNN_VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""How many products torch's binding of oneDNN, and oneDNN itself, remember; read once, when either is loaded."""

_ONEDNN_KEPT = "64"
"""More than the different products of one update. What is remembered for one size of a product takes a megabyte, and
nearly every batch has another number of targets: 1,024 of each, the default, come to gigabytes (measured)."""


def keep_memory() -> None:
    """Keep freed memory in the process, ask for large pages, bound oneDNN's caches; call it before torch is imported.

    Does nothing where the C library is not glibc, and leaves what the environment says about either as it is.
    """
    # Read by torch once, when it allocates for the first time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for name in _ONEDNN_VARIABLES:
        os.environ.setdefault(name, _ONEDNN_KEPT)
    if not _is_glibc() or _is_set():
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)


def _is_glibc() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


def _is_set() -> bool:
    """Whether the environment says how memory is kept."""
    return "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in _MALLOC_VARIABLES)
