"""The C library's allocator, told to keep what a training step frees, because the next step asks for it again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most that glibc takes on 64 bits


def keep_freed_memory() -> bool:
    """By default glibc gives blocks over 128 KB back to the kernel when they are freed, and the next step pays for
    fetching and zeroing each page again. True where it could be changed: glibc on Linux.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    took = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(took and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def give_back() -> None:
    """Give what is free back to the system after all, on the GPU too: before memory is measured, or where it ran out."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
