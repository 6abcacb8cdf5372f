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
import weakref
from functools import cache
from typing import Any

import numpy as np

PRIVATE_BYTES = 1 << 18  # from this size on a private mapping takes less time than a copy
MAX_PRIVATE = (
    1 << 14
)  # mappings that callers hold at once; Linux allows a process 65,530 in all, beyond this many we copy
MADV_POPULATE_READ = 22  # since Linux 5.14; an older kernel answers EINVAL and reads pages when they are touched
EHWPOISON = 133  # a page on a memory chip that failed; Python's errno does not name it

_private_mappings: weakref.WeakSet[_Mapping] = weakref.WeakSet()  # those that callers still hold


class MappedFile:
    """An open file in memory: one descriptor, closed when the last thread drops it, whatever of it callers still hold.

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
        self._bytes = np.asarray(_Mapping(self.descriptor, 0, self._size, private=False))

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
        private = own and size >= PRIVATE_BYTES and len(_private_mappings) < MAX_PRIVATE
        part = self._private(offset, size) if private else self._bytes[offset : offset + size]
        if not in_memory:
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            page = part.ctypes.data % mmap.PAGESIZE
            failed = _libc().madvise(part.ctypes.data - page, size + page, MADV_POPULATE_READ)
            if failed and (number := ctypes.get_errno()) != errno.EINVAL:
                number = errno.EIO if number in (errno.EFAULT, EHWPOISON) else number  # pages that cannot be read
                raise OSError(number, os.strerror(number), self.name)
        return part.copy() if own and not private else part

    def _private(self, offset: int, size: int) -> np.ndarray:
        """A mapping of its own: pages that the caller writes become copies, the file stays unchanged."""
        gap = offset % mmap.ALLOCATIONGRANULARITY
        mapping = _Mapping(self.descriptor, offset - gap, gap + size, private=True)
        _private_mappings.add(mapping)
        return np.asarray(mapping)[gap:]


class _Mapping:
    """Pages of a file in memory, unmapped when the last array over them is gone.

    `mmap.mmap` would hold a descriptor of its own for every mapping, up to Python 3.13, where `trackfd=False` prevents it:
    a process at the usual limit of 1,024 could hold no thousand features.

    Args:
        descriptor: of the open file; may be closed afterwards.
        offset: of the first byte, a multiple of `mmap.ALLOCATIONGRANULARITY`.
        size: bytes, more than 0.
        private: map it writable: a page that is written becomes a copy, the file stays unchanged.

    Raises:
        OSError: the file cannot be mapped, ENOMEM where the process has too many mappings.
    """

    def __init__(self, descriptor: int, offset: int, size: int, private: bool) -> None:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        access = mmap.PROT_READ | mmap.PROT_WRITE if private else mmap.PROT_READ
        self.size = 0  # nothing to unmap yet
        address = _libc().mmap(None, size, access, flags, descriptor, offset)
        if address in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address, self.size, self._unmap = address, size, _libc().munmap
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, not private)}

    def __del__(self) -> None:
        if self.size:
            self._unmap(self.address, self.size)


@cache
def _libc() -> Any:
    """The C library: its calls let other threads run meanwhile, while `mmap.madvise` holds Python's lock."""
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
