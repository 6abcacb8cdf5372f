"""What a feature store needs of the place that holds its files.

A backend publishes whole files, lets exactly one of any number of writers take a name, and reads ranges of a file into
memory that the caller keeps. Names are relative to the backend's location, with slashes. Credentials and endpoints are
fsspec's business (AWS_ENDPOINT_URL, fsspec's configuration files, ...).

Errors are OSErrors that name the reason: FileNotFoundError (no such file), PermissionError (rights or credentials), and
others with their `errno` (EMFILE: too many open files, EIO: the disk or server failed). Only EOFError, a file that is
shorter than it was published, means damage.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mova_core.io.uris import is_url


class StoreError(RuntimeError):
    """Something is wrong with a store; the message is one line that names the part at fault and the fix."""


class StorageBackend(ABC):
    """The folder of a store, or of a part of it. Picklable; usable from any number of threads.

    Attributes:
        location: absolute path or URL of the folder; `open_storage` opens an equal backend from it.
        readers: number of threads that read fastest together.
        coalesce_gap: (gap, most) in bytes: neighbouring ranges with at most `gap` between them are read as one range of at
            most `most`. None where ranges are mapped into memory without a copy, so that merging gains nothing.
        failed_write_is_final: a file whose write failed cannot appear later. False for object stores: the request may have
            been carried out although its reply was lost.
    """

    location: str
    readers: int
    coalesce_gap: tuple[int, int] | None
    failed_write_is_final: bool

    @property
    def mapped(self) -> bool:
        """Whether `read_range` maps large ranges into memory instead of copying them."""
        return self.coalesce_gap is None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.location,)

    @abstractmethod
    def mkdir(self, *folders: str) -> None:
        """Creates the location and folders in it where they do not exist.

        Raises:
            StoreError: the location is a file.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Free space in bytes; None where no limit is known."""

    @abstractmethod
    def list_files(self, folder: str, suffix: str = "") -> list[str]:
        """The names of a folder's published files, sorted; empty if the folder does not exist."""

    @abstractmethod
    def list_folders(self, folder: str = "") -> list[str]:
        """The names of the folders in a folder, sorted; empty if the folder does not exist."""

    @abstractmethod
    def list_temporaries(self) -> list[str]:
        """Unpublished files in all folders, whose writers may have died."""

    @abstractmethod
    def mtime_ns(self, folder: str) -> int | None:
        """When names in a folder last changed, in ns since 1970, 0 if the folder does not exist.

        None where the storage keeps no such time: then only a listing shows changes.
        """

    @abstractmethod
    def stat(self, name: str) -> tuple[int, float]:
        """Bytes and time of change (seconds since 1970) of a file. Raises FileNotFoundError."""

    def exists(self, name: str) -> bool:
        """Whether a file of this name is published."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def read(self, name: str, anew: bool = False) -> bytes:
        """A whole file.

        Args:
            anew: read from the disk, not from this machine's page cache, which would hide damage on the disk.

        Raises:
            OSError: see the module's docstring.
        """

    @abstractmethod
    def prefetch(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """Starts to read ranges (name, offset, bytes) that `read_range` will be called for. Ignores errors."""

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int, own: bool = False) -> np.ndarray:
        """A range of a file: uint8 of shape (size,).

        Args:
            own: return memory that the caller may change, without a change to the file; otherwise the array is read-only.

        Raises:
            EOFError: the file ends within the range.
            OSError: see the module's docstring.
        """

    @abstractmethod
    def local_copy(self, name: str, size: int, xxh3: str) -> Path:
        """A local file with the content of `name`: the file itself, or a copy in this user's cache folder.

        Args:
            size: bytes of the file as published.
            xxh3: xxh3-64 of its content, 16 hex digits.

        Raises:
            ValueError: the file has another size or content.
            OSError: see the module's docstring.
        """

    @abstractmethod
    def put(self, name: str, pieces: Sequence[Any]) -> None:
        """Publishes a file that no other process writes: readers see the whole file or none, also after a power cut.

        Args:
            pieces: objects with the buffer protocol, written one after another.
        """

    @abstractmethod
    def put_if_absent(self, name: str, content: Any) -> bool:
        """Publishes a file unless the name is taken; of several writers at once exactly one succeeds.

        Returns:
            False if the name is taken.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes a file if it exists."""


def checked(path: Path, size: int, xxh3: str) -> Path:
    """The path of a local file that is whole.

    Raises:
        ValueError: it has another size or content.
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise ValueError(f"{path} has {found:,} bytes, {size:,} were published")
        part = memoryview(bytearray(1 << 20))
        while count := file.readinto(part):  # read, not mapped: a bad sector is then an error and no SIGBUS
            digest.update(part[:count])
    if digest.hexdigest() != xxh3:
        raise ValueError(f"{path} has other bytes than were published")
    return path


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
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


@contextmanager
def writing(store: str) -> Iterator[None]:
    """Turns an OSError of a write to a store into a StoreError: one line with the fix.

    Args:
        store: location of the store.
    """
    try:
        yield
    except OSError as error:
        if is_url(store):
            fix = "check that server, and the rights and credentials for it"
        else:
            fix = _FIXES.get(error.errno or 0, "check that disk")
        reason = " ".join(str(error.strerror or error).split())
        raise StoreError(
            f"cannot write to store {store} ({reason}): {fix}, then run the same command again; "
            f"what was committed is intact"
        ) from error
