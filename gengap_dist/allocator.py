"""Memory that one pass frees is kept for the next, where it computes on a CPU with glibc's malloc."""

import ctypes
import os

SETTINGS = {-4: 0, -1: -1, -2: 64 * 2**20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of mallopt(3)
OWN_WORDS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tell malloc to keep what is freed, for the rest of this process; whether it was told.

    By default glibc maps large blocks anew each time and gives back what is free at the heap's end, so that every pass
    waits for the kernel to hand out zeroed pages again. Free blocks of the wrong sizes stay, too: the peak grows. Where
    the environment has words of its own for the allocator (mallopt(3), ld.so(8)), those hold; glibc's own default is
    MALLOC_TRIM_THRESHOLD_=131072.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems and C libraries have none
    if mallopt is None or any(name.startswith(OWN_WORDS) for name in os.environ):
        return False
    return sum(bool(mallopt(name, value)) for name, value in SETTINGS.items()) == len(SETTINGS)
