"""What the C library does with freed memory: kept for the next step, instead of given back and fetched anew."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 << 20  # what glibc lets lie in its heap at most; larger blocks go back to the system as before
_KEPT = (2 << 30) - 1  # bytes of free heap from which on it does give back


def keep_freed() -> bool:
    """Let glibc keep up to 2 GB of freed tensors (mallopt(3)); whether it did. The process's peak stays what it was.

    Left alone it trims its heap between any two steps, and the system clears every page of the next one again
    (`benchmarks/results/speed.md`). Nothing is done where `MALLOC_*` variables say what to do, or by another C library.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
