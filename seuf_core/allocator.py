"""Two settings of the process that a model read in parts and a step of milliseconds need. Torch-free."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Final

# glibc gives back every block above its threshold when it is freed, and the next tensor of the size faults all of its
# pages in again: a step of 18 ms took 29 on a quiet virtual machine and 450 on a busy one. Blocks up to the largest
# size that glibc allows here are kept, at most KEEP_BYTES of them at the top of the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT: Final = 32 << 20
KEEP_BYTES: Final = 256 << 20

# oneDNN keeps a compiled product, with packed memory of its own, for every shape it has met: about .7 MB each, and
# 1024 of them by default. seuf_core.moe.grouped asks for few shapes.
ONEDNN_CACHES: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


@cache
def settle() -> None:
    """Keep freed memory for the next step, and few compiled matrix products. Once a process, before its first pass.

    What the environment says already is left alone.
    """
    for name, value in ONEDNN_CACHES.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Where the C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
