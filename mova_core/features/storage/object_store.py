"""A store in a bucket, or in a folder of any other filesystem that fsspec knows."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mova_core.features.storage.base import StorageBackend, StoreError, checked
from mova_core.io.atomic import atomic_path
from mova_core.io.cache import cache_folder, private_folder
from mova_core.io.filesystem import NotFoundError, ReadError, open_filesystem, with_retries

COPY_BYTES = 32 << 20  # of a request of `local_copy`

T = TypeVar("T")


class ObjectStorage(StorageBackend):
    """A folder of an object store that honours If-None-Match, or of any other filesystem that fsspec knows.

    Raises:
        StoreError: no installed package opens the URL.
    """

    readers, coalesce_gap, failed_write_is_final = 16, (1 << 16, 8 << 20), False

    def __init__(self, location: str) -> None:
        self.location = location
        self._opened: tuple[int, Any, str] | None = None  # process id, filesystem, path of the location in it
        self._opening = threading.Lock()
        try:
            self._connect()
        except ReadError as error:
            raise StoreError(f"{location} cannot be opened ({error.strerror}): give a folder or a URL") from None

    def _connect(self) -> tuple[Any, str]:
        """The filesystem, and the path of the location in it.

        Clients do not survive a fork: a worker process of a DataLoader opens its own.
        """
        with self._opening:
            if self._opened is None or self._opened[0] != os.getpid():
                filesystem, path = open_filesystem(self.location, use_listings_cache=False)
                self._opened = os.getpid(), filesystem, path.rstrip("/")
            return self._opened[1], self._opened[2]

    def _request(self, call: Callable[[Any, str], T], name: str) -> T:
        """`call(filesystem, path of name)`, with retries beyond those of the filesystem's own client."""

        def attempt() -> T:
            filesystem, root = self._connect()
            return call(filesystem, f"{root}/{name}" if name else root)

        return with_retries(attempt)

    def mkdir(self, *folders: str) -> None:
        """See `StorageBackend`; a bucket has no folders."""

    def free_bytes(self) -> int | None:
        """See `StorageBackend`."""
        return None

    def list_files(self, folder: str, suffix: str = "") -> list[str]:
        """See `StorageBackend`."""
        return [name for name in self._list(folder, "file") if name.endswith(suffix)]

    def list_folders(self, folder: str = "") -> list[str]:
        """See `StorageBackend`."""
        return self._list(folder, "directory")

    def _list(self, folder: str, kind: str) -> list[str]:
        try:
            entries = self._request(lambda filesystem, path: filesystem.ls(path, detail=True), folder)
        except NotFoundError:
            return []
        except ReadError as error:
            if error.errno == errno.ENOTDIR:
                return []
            raise
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == kind)
        return sorted(name for name in names if name and not name.startswith("."))

    def list_temporaries(self) -> list[str]:
        """See `StorageBackend`: none, for an object is visible whole or not at all.

        Parts of an unfinished multipart upload are deleted by a lifecycle rule of the bucket.
        """
        return []

    def mtime_ns(self, folder: str) -> int | None:
        """See `StorageBackend`."""
        return None

    def stat(self, name: str) -> tuple[int, float]:
        """See `StorageBackend`."""
        size = self._file_size(name)
        return size, self._request(lambda filesystem, path: filesystem.modified(path), name).timestamp()

    def exists(self, name: str) -> bool:
        """See `StorageBackend`; one request, `stat` takes two."""
        try:
            self._file_size(name)
        except NotFoundError:
            return False
        return True

    def _file_size(self, name: str) -> int:
        entry = self._request(lambda filesystem, path: filesystem.info(path), name)
        if entry["type"] != "file":
            raise NotFoundError(errno.ENOENT, f"{name} is no file")
        return entry["size"]

    def read(self, name: str, anew: bool = False) -> bytes:
        """See `StorageBackend`."""
        # Without `start` s3fs would first ask for the size of the file.
        return bytes(self._request(lambda filesystem, path: filesystem.cat_file(path, start=0), name))

    def prefetch(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """See `StorageBackend`: nothing, for `readers` threads keep enough requests under way."""

    def read_range(self, name: str, offset: int, size: int, own: bool = False) -> np.ndarray:
        """See `StorageBackend`; one request."""
        end = offset + size
        content = self._request(lambda filesystem, path: filesystem.cat_file(path, start=offset, end=end), name)
        if len(content) != size:
            raise EOFError(f"{name} ends before byte {end}")
        return np.frombuffer(bytearray(content) if own else content, np.uint8)

    def local_copy(self, name: str, size: int, xxh3: str) -> Path:
        """See `StorageBackend`: a copy in the cache folder, deleted when a newer version of the same folder is copied."""
        folder = private_folder(cache_folder("indexes"))
        stem = hashlib.sha256(f"{self.location}/{name.rpartition('/')[0]}".encode()).hexdigest()[:16]
        copy = folder / f"{stem}-{xxh3}"
        with suppress(FileNotFoundError, ValueError):  # not there yet, or damaged: then copied again
            return checked(copy, size, xxh3)
        with atomic_path(copy, durable=False) as temporary:
            with open(temporary, "xb") as file:
                for offset in range(0, size, COPY_BYTES):
                    try:
                        file.write(self.read_range(name, offset, min(COPY_BYTES, size - offset)).data)
                    except EOFError as error:
                        raise ValueError(str(error)) from None
            checked(temporary, size, xxh3)
        for other in folder.glob(f"{stem}-*"):
            if other != copy:
                other.unlink(missing_ok=True)  # processes that have the older copy mapped keep its content
        return copy

    def put(self, name: str, pieces: Sequence[Any]) -> None:
        """See `StorageBackend`; one request, or a multipart upload."""
        content = b"".join(pieces)

        def put(filesystem: Any, path: str) -> None:
            try:
                filesystem.pipe_file(path, content)
            except FileNotFoundError:
                # NoSuchUpload: an earlier attempt completed the multipart upload and its reply was lost. Or no such bucket.
                if self._file_size(name) != len(content):
                    raise

        self._request(put, name)

    def put_if_absent(self, name: str, content: Any) -> bool:
        """See `StorageBackend`; by a condition that the server checks. After an unclear reply the name is read back.

        Raises:
            NotImplementedError, TypeError, ValueError: the filesystem has no conditional write.
        """
        content = bytes(content)

        def create(filesystem: Any, path: str) -> bool:
            try:
                filesystem.pipe_file(path, content, mode="create")
                return True
            except (PermissionError, NotImplementedError, TypeError, ValueError):
                raise
            except Exception as error:
                # The name is taken, or the request was carried out and its reply lost.
                with suppress(NotFoundError):
                    return self.read(name) == content
                if isinstance(error, FileExistsError):  # taken, and deleted since: another attempt may take it
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from error
                raise

        try:
            return self._request(create, name)
        except ReadError as error:
            if isinstance(error.__cause__, (NotImplementedError, TypeError, ValueError)):
                raise error.__cause__ from None
            raise

    def delete(self, name: str) -> None:
        """See `StorageBackend`."""
        with suppress(NotFoundError):
            self._request(lambda filesystem, path: filesystem.rm_file(path), name)
