"""A command's memory: what the C library does with what is freed, and what Python's collector looks through. A process of its own
ends soon; both are left as they are in a Python program, which is its owner's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

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


@contextlib.contextmanager
def collecting_late() -> Iterator[None]:
    """Python's collector rests until `collect_from_now`, and is spared all that is left at the end.

    What torch and transformers make on import, three quarters of a million objects, is there to stay, and the collector goes through it again and again,
    once more as the process ends (`benchmarks/results/speed.md`).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()


def collect_from_now() -> None:
    """End the rest of `collecting_late`: what there is by now stays, what comes is looked through. Elsewhere nothing is done."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
