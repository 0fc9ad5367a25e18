"""Freed memory: batch after batch reuses it, chunk after chunk gives back what is scattered."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LIMITS = (2**31 - 1, 32 * 2**20)
"""Sizes below which blocks are kept: the largest that mallopt takes, and what older C libraries allow."""


def keep_freed_memory() -> bool:
    """Tells glibc's malloc not to hand large blocks back to the system; False where there is no glibc.

    By default a tensor above 32 MB is mapped anew each time, and the heap's end is handed back whenever it is
    free; the pages are then faulted in again on first touch, which can cost as much as the arithmetic on them.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and any(
        mallopt(_M_MMAP_THRESHOLD, limit) and mallopt(_M_TRIM_THRESHOLD, limit) for limit in _LIMITS
    )


def release_freed_memory() -> bool:
    """Gives unused pages back to the system, between pieces of work: batches of many sizes leave holes, and what a
    process holds would grow with the number of images. False where there is no glibc."""
    trim = _glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def _glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
    return found
