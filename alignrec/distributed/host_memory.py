"""The host's allocator, set for work whose tensors come and go in each step."""

import contextlib
import ctypes
from collections.abc import Iterator

# Parameters of mallopt (malloc.h of glibc) and their defaults (mallopt(3)).
_TRIM_THRESHOLD, _TRIM_THRESHOLD_DEFAULT = -1, 128 * 1024
_MMAP_MAX, _MMAP_MAX_DEFAULT = -4, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have freed tensors' memory used again for the length of the block, not given back.

    Left alone, glibc maps every tensor above 32 MiB afresh, so the kernel must clear its pages, one
    fault per 4 KiB, each time that a step makes it; in a virtual machine that costs several times
    what is computed on it. The process holds the most that it has needed until the block ends.
    Does nothing where the C library is another one.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_DEFAULT)
        library.malloc_trim(0)
