"""Files of a local store in memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

import numpy as np

_LARGE = 1 << 18  # bytes from which a mapping is made faster than a copy
_MOST = 1 << 14  # of them that a process has at once; Linux allows it 65,530 for everything
_POPULATE_READ = 22  # of madvise(2), since Linux 5.14
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets other threads run, unlike mmap's own
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_given: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # mappings that somebody else has


class _Mapped:
    """An open file in memory; closed when the last thread lets go of it."""

    def __init__(self, folder: str, name: str):
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
        """Whether its last page is, and so most likely all of it; EOFError where the file ends before that."""
        end = offset + size
        if end <= self._size:
            try:
                if os.preadv(self.descriptor, [bytearray(1)], end - 1, os.RWF_NOWAIT):
                    return True
            except OSError:  # not there, or a file system that cannot tell
                return False
        raise EOFError(f"{self.name} ends before byte {end}")

    def read_range(self, offset: int, size: int, own: bool) -> np.ndarray:
        """See `StorageBackend`."""
        there = self.in_memory(offset, size)
        mapped = own and size >= _LARGE and len(_given) < _MOST
        part = self._private(offset, size) if mapped else self._bytes[offset : offset + size]
        if not there:  # read now: what the disk refuses is an error here, and a signal that kills where it is touched
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            page = part.ctypes.data % mmap.PAGESIZE
            if _madvise(part.ctypes.data - page, size + page, _POPULATE_READ) and ctypes.get_errno() == errno.EFAULT:
                raise OSError(errno.EIO, f"cannot read {self.name}")
        return part.copy() if own and not mapped else part

    def _private(self, offset: int, size: int) -> np.ndarray:
        """A mapping of which written pages become this process's alone."""
        gap = offset % mmap.ALLOCATIONGRANULARITY
        access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        private = mmap.mmap(self.descriptor, gap + size, offset=offset - gap, **access)
        _given.add(private)
        return np.frombuffer(private, np.uint8, size, gap)
