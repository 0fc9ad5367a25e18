"""Keeps freed memory with the process, so that batch after batch reuses it."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LIMITS = (2**31 - 1, 32 * 2**20)
"""Sizes below which blocks are kept: the largest that mallopt takes, and what older C libraries allow."""


def keep_freed_memory() -> bool:
    """Tells glibc's malloc not to hand large blocks back to the system; False where there is no glibc.

    By default a tensor above 32 MB is mapped anew each time, and the heap's end is handed back whenever it is
    free; the pages are then faulted in again on first touch, which can cost as much as the arithmetic on them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return any(mallopt(_M_MMAP_THRESHOLD, limit) and mallopt(_M_TRIM_THRESHOLD, limit) for limit in _LIMITS)
