"""Files of a local store, mapped into memory (Linux).

A range is handed out without a copy wherever that is faster. Pages that are not in memory yet are read at once by
`madvise(MADV_POPULATE_READ)`: a page that the disk cannot read is then an error here, while touching the page later would end
the process with SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import weakref
from collections.abc import Callable
from functools import cache

import numpy as np

PRIVATE_BYTES = 1 << 18  # from this size on a private mapping takes less time than a copy
# Most private mappings at once: Linux allows a process 65,530 mappings in all.
MAX_PRIVATE = 1 << 14
MADV_POPULATE_READ = 22  # since Linux 5.14; an older kernel answers EINVAL and reads pages when they are touched

_private_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # those that callers still hold


class MappedFile:
    """An open file in memory, closed when the last thread drops it.

    Args:
        folder, name: the file is `folder/name`; errors name `name`.

    Raises:
        EOFError: the file is empty.
        OSError: the file cannot be opened or mapped.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.descriptor = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self.descriptor).st_size
        if not self._size:
            raise EOFError(f"{name} is empty")
        self._bytes = np.frombuffer(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ), np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def in_memory(self, offset: int, size: int) -> bool:
        """Whether the last page of a range is in the page cache, and so most likely all of the range.

        Raises:
            EOFError: the file ends within the range.
        """
        end = offset + size
        if end <= self._size:
            try:
                if os.preadv(self.descriptor, [bytearray(1)], end - 1, os.RWF_NOWAIT):
                    return True
            except OSError:  # EAGAIN: not in memory; EOPNOTSUPP: the file system cannot tell
                return False
        raise EOFError(f"{self.name} ends before byte {end}")

    def prefetch(self, offset: int, size: int) -> None:
        """Starts to read a range from the disk and returns at once."""
        if not self.in_memory(offset, size):
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read_range(self, offset: int, size: int, own: bool) -> np.ndarray:
        """See `StorageBackend.read_range`."""
        in_memory = self.in_memory(offset, size)
        private = own and size >= PRIVATE_BYTES and len(_private_mappings) < _max_private()
        part = self._private(offset, size) if private else self._bytes[offset : offset + size]
        if not in_memory:
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            page = part.ctypes.data % mmap.PAGESIZE
            failed = _madvise()(part.ctypes.data - page, size + page, MADV_POPULATE_READ)
            if failed and ctypes.get_errno() == errno.EFAULT:
                raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)
        return part.copy() if own and not private else part

    def _private(self, offset: int, size: int) -> np.ndarray:
        """A mapping of its own: pages that the caller writes become copies, the file stays unchanged."""
        gap = offset % mmap.ALLOCATIONGRANULARITY
        access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        mapping = mmap.mmap(self.descriptor, gap + size, offset=offset - gap, **access)
        _private_mappings.add(mapping)
        return np.frombuffer(mapping, np.uint8, size, gap)


def _max_private() -> int:
    """Half of the files that this process may open, because every `mmap.mmap` holds a descriptor of its own."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_PRIVATE if limit == resource.RLIM_INFINITY else min(MAX_PRIVATE, limit // 2)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    """madvise(2) of the C library, which lets other threads run meanwhile; `mmap.madvise` holds Python's lock."""
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
