"""Where a store lies: a local folder, or a bucket or folder of any filesystem that fsspec knows.

Both put files down whole, give a name to only one of any number of writers, and read ranges of a file into memory that
the caller has. Names are relative, with slashes. Credentials and endpoints are fsspec's own business (AWS_ENDPOINT_URL,
fsspec's configuration files, ...).
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class StoreError(RuntimeError):
    """Something is wrong with a store: one line that names the thing and the fix."""


class StorageBackend(ABC):
    """A folder, and all that the store does with one. Picklable; usable from any number of threads.

    Attributes:
        location: absolute folder or URL; `open_storage` makes the same place of it.
        readers: how many threads read from it at once.
        mapped: gives memory away without a copy.
        near: gap up to which two rows are read as one, in bytes, and how large the whole may become; None never.
        certain: when a call failed, nothing comes of it later.
    """

    location: str
    readers: int
    mapped: bool
    coalesce_gap: tuple[int, int] | None
    failed_write_is_final: bool

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.location,)

    @abstractmethod
    def mkdir(self, *folders: str) -> None:
        """Makes folders, itself among them, that are not there."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """What can still be written; None where no limit is known."""

    @abstractmethod
    def list_files(self, folder: str, suffix: str = "") -> list[str]:
        """The names of a folder's published files, sorted; none where there is no such folder."""

    @abstractmethod
    def list_folders(self, folder: str = "") -> list[str]:
        """The names of the folders in a folder, sorted; none where there is no such folder."""

    @abstractmethod
    def list_temporaries(self) -> list[str]:
        """Files of writers that may have died, in all folders."""

    @abstractmethod
    def mtime_ns(self, folder: str) -> int | None:
        """When names in a folder last changed, in ns of this machine's clock; None where that cannot be told."""

    @abstractmethod
    def stat(self, name: str) -> tuple[int, float]:
        """Bytes and time of change (seconds since 1970) of a file, or FileNotFoundError."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def read(self, name: str, anew: bool = False) -> bytes:
        """A whole file; `anew` not from this machine's page cache, which says nothing about the disk."""

    @abstractmethod
    def prefetch(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """Begins to fetch parts of files (name, offset, size) that will be asked for next; never fails."""

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int, own: bool = False) -> np.ndarray:
        """A part of a file: uint8, 1-D, not to be written to unless it is the caller's `own` (and changes no file).

        Raises:
            FileNotFoundError, OSError: there is no such file, or it cannot be read.
            EOFError: the file ends before that.
        """

    @abstractmethod
    def local_copy(self, name: str, size: int, mark: str) -> Path:
        """A local file with the bytes of `name`, which are `size` and known by `mark`; ValueError if it has others."""

    @abstractmethod
    def put(self, name: str, pieces: Sequence[Any]) -> None:
        """Writes a file that nobody else writes: it is seen whole or not at all, and stays."""

    @abstractmethod
    def put_if_absent(self, name: str, content: Any) -> bool:
        """The same for a name that others may write as well: False where another's bytes have it."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""


_FIXES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "raise its quota",
    errno.EFBIG: "raise the file size limit",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable for this user",
    errno.EEXIST: "give a folder",
    errno.ENOTDIR: "give a folder",
    errno.EPERM: "put it on a file system with hard links",
    errno.EOPNOTSUPP: "put it on a file system with hard links",
}


@contextmanager
def writing(store: str) -> Iterator[None]:
    """Turns what the disk or server refuses into one line with the fix."""
    try:
        yield
    except OSError as error:
        remote = "://" in store
        fix = _FIXES.get(
            error.errno or 0, "check that server, and the rights given there" if remote else "check that disk"
        )
        reason = " ".join(str(error.strerror or error).split())
        raise StoreError(
            f"cannot write to store {store} ({reason}): {fix}, then run the same command again; "
            f"what was committed is intact"
        ) from error
