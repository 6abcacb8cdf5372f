"""Where a store lies: a local folder, or a bucket or folder of any filesystem that fsspec knows.

Both put files down whole, give a name to only one of any number of writers, and read ranges of a file into memory that
the caller has. Names are relative, with slashes. Credentials and endpoints are fsspec's own business (AWS_ENDPOINT_URL,
fsspec's configuration files, ...).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

_LOCAL = ("file://", "local://")
_LARGE = 1 << 18  # bytes from which a mapping is made faster than a copy
_MOST = 1 << 14  # of them that a process has at once; Linux allows it 65,530 for everything
_POPULATE_READ = 22  # of madvise(2), since Linux 5.14
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets other threads run, unlike mmap's own
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_given: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # mappings that somebody else has
_PAUSES = (0.1, 0.4, 1.6, 6.4)  # seconds between attempts at a server, beyond those of its own client
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)


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
        return open_storage, (self.location,)

    def below(self, folder: str) -> StorageBackend:
        """The place of a folder in it."""
        return open_storage(f"{self.location}/{folder}")

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


class LocalStorage(StorageBackend):
    """A folder of a file system with hard links."""

    readers, mapped, coalesce_gap, failed_write_is_final = 4, True, None, True

    def __init__(self, location: str):
        self.location = location
        self._open = lru_cache(maxsize=64)(partial(_Mapped, location))

    def _at(self, name: str) -> str:
        return f"{self.location}/{name}" if name else self.location

    def mkdir(self, *folders: str) -> None:
        """See `StorageBackend`."""
        if os.path.exists(self.location) and not os.path.isdir(self.location):
            raise StoreError(f"{self.location} is a file: give the folder of a feature store")
        for folder in (self._at(name) for name in ("", *folders)):
            made = []
            at = folder
            while not os.path.isdir(at):
                made.append(at)
                at = os.path.dirname(at)
            if made:
                os.makedirs(folder, exist_ok=True)
            for one in made:
                _sync(os.path.dirname(one))

    def free_bytes(self) -> int | None:
        """See `StorageBackend`."""
        return shutil.disk_usage(self.location).free

    def list_files(self, folder: str, suffix: str = "") -> list[str]:
        """See `StorageBackend`."""
        return [name for name in self._entries(folder, os.DirEntry.is_file) if name.endswith(suffix)]

    def list_folders(self, folder: str = "") -> list[str]:
        """See `StorageBackend`."""
        return self._entries(folder, os.DirEntry.is_dir)

    def _entries(self, folder: str, kind: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        try:
            with os.scandir(self._at(folder)) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith(".") and kind(entry))
        except FileNotFoundError:  # copying tools drop empty folders
            return []

    def list_temporaries(self) -> list[str]:
        """See `StorageBackend`."""
        root = Path(self.location)
        return [str(path.relative_to(root)) for path in root.glob("**/.*.tmp")]

    def mtime_ns(self, folder: str) -> int | None:
        """See `StorageBackend`."""
        try:
            return os.stat(self._at(folder)).st_mtime_ns
        except FileNotFoundError:
            return 0

    def stat(self, name: str) -> tuple[int, float]:
        """See `StorageBackend`."""
        found = os.stat(self._at(name))
        return found.st_size, found.st_mtime

    def read(self, name: str, anew: bool = False) -> bytes:
        """See `StorageBackend`."""
        with open(self._at(name), "rb", buffering=0) as file:
            if anew:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()

    def prefetch(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """See `StorageBackend`: all at once, so that the disk has as many requests as it can take. 1.5x of four reading threads."""
        for name, offset, size in parts:
            with suppress(OSError, EOFError):
                file = self._open(name)
                if not file.in_memory(offset, size):
                    os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read_range(self, name: str, offset: int, size: int, own: bool = False) -> np.ndarray:
        """See `StorageBackend`; of the page cache, large ones without a copy."""
        return self._open(name).read_range(offset, size, own)

    def local_copy(self, name: str, size: int, mark: str) -> Path:
        """See `StorageBackend`."""
        path = Path(self._at(name))
        if path.stat().st_size != size:
            raise ValueError(f"{path} is not the file that was published")
        return path

    def put(self, name: str, pieces: Sequence[Any]) -> None:
        """See `StorageBackend`."""
        path, temporary = self._at(name), self._temporary(name)
        try:
            self._write(temporary, pieces)
            os.rename(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _sync(os.path.dirname(path))

    def put_if_absent(self, name: str, content: Any) -> bool:
        """See `StorageBackend`; by link(2), which never replaces."""
        path, temporary = self._at(name), self._temporary(name)
        try:
            self._write(temporary, [content])
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            _remove(temporary)
        _sync(os.path.dirname(path))
        return True

    def delete(self, name: str) -> None:
        """See `StorageBackend`."""
        _remove(self._at(name))

    def _temporary(self, name: str) -> str:
        folder, _, last = name.rpartition("/")
        return self._at(os.path.join(folder, f".{last}-{uuid.uuid4().hex[:12]}.tmp"))

    def _write(self, path: str, pieces: Sequence[Any]) -> None:
        with open(path, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


class ObjectStorage(StorageBackend):
    """A folder of an object store, or of anything else that fsspec opens."""

    readers, mapped, coalesce_gap, failed_write_is_final = 16, False, (1 << 16, 8 << 20), False

    def __init__(self, location: str):
        self.location = location
        self._opened: tuple[int, Any, str] | None = None
        self._opening = threading.Lock()
        _ = self._fs  # says now what is not installed

    @property
    def _fs(self) -> Any:
        """The filesystem; it does not survive a fork, so a DataLoader worker opens its own."""
        with self._opening:
            if self._opened is None or self._opened[0] != os.getpid():
                import fsspec

                try:
                    filesystem, path = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
                except ImportError as error:
                    extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(self.location.split(":")[0])
                    fix = f": pip install 'mova-ray[{extra}]'" if extra else ""
                    raise StoreError(f"{self.location} cannot be opened ({error}){fix}") from None
                except ValueError as error:
                    raise StoreError(f"{self.location} cannot be opened ({error}): give a folder or a URL") from None
                self._opened = os.getpid(), filesystem, path.rstrip("/")
            return self._opened[1]

    def _at(self, name: str) -> str:
        _ = self._fs
        assert self._opened is not None
        return f"{self._opened[2]}/{name}" if name else self._opened[2]

    def _ask(self, act: Callable[[], Any]) -> Any:
        """Asks again while the server is out of order, longer than its own client does."""
        for pause in (*_PAUSES, None):
            try:
                return act()
            except _FINAL:
                raise
            except Exception as error:
                if pause is None or "Credentials" in type(error).__name__:
                    raise _as_os_error(error) from error
            time.sleep(pause)
        raise AssertionError

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
            found = self._ask(lambda: self._fs.ls(self._at(folder), detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == kind)
        return sorted(name for name in names if name and not name.startswith("."))

    def list_temporaries(self) -> list[str]:
        """See `StorageBackend`: an object is there whole or not at all. (A rule of the bucket ends unfinished uploads.)"""
        return []

    def mtime_ns(self, folder: str) -> int | None:
        """See `StorageBackend`."""
        return None

    def stat(self, name: str) -> tuple[int, float]:
        """See `StorageBackend`."""
        path = self._at(name)
        found = self._ask(lambda: self._fs.info(path))
        if found["type"] != "file":
            raise FileNotFoundError(path)
        return found["size"], self._ask(lambda: self._fs.modified(path)).timestamp()

    def exists(self, name: str) -> bool:
        """See `StorageBackend`."""
        try:
            return bool(self._ask(lambda: self._fs.info(self._at(name)))["type"] == "file")
        except FileNotFoundError:
            return False

    def read(self, name: str, anew: bool = False) -> bytes:
        """See `StorageBackend`."""
        # From a start on: a whole file would be asked for its size first.
        return bytes(self._ask(lambda: self._fs.cat_file(self._at(name), start=0)))

    def prefetch(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """See `StorageBackend`; the reading threads are enough."""

    def read_range(self, name: str, offset: int, size: int, own: bool = False) -> np.ndarray:
        """See `StorageBackend`; one request."""
        content = self._ask(lambda: self._fs.cat_file(self._at(name), start=offset, end=offset + size))
        if len(content) != size:
            raise EOFError(f"{name} ends before byte {offset + size}")
        return np.frombuffer(bytearray(content) if own else content, np.uint8)

    def local_copy(self, name: str, size: int, mark: str) -> Path:
        """See `StorageBackend`; kept in the user's cache folder, where a newer one of the same folder replaces it."""
        import hashlib

        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mova" / "stores"
        stem = hashlib.sha256(f"{self.location}/{name.rpartition('/')[0]}".encode()).hexdigest()[:16]
        path = folder / f"{stem}-{mark}"
        if path.exists() and path.stat().st_size == size:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp") as file:
            part = 32 << 20
            for at in range(0, size, part):
                try:
                    file.write(self.read_range(name, at, min(part, size - at)).data)
                except EOFError as error:
                    raise ValueError(str(error)) from None
            file.flush()
            with suppress(FileExistsError):
                os.link(file.name, path)
        for older in folder.glob(f"{stem}-*"):
            if older != path:
                older.unlink(missing_ok=True)  # who has it mapped keeps it
        return path

    def put(self, name: str, pieces: Sequence[Any]) -> None:
        """See `StorageBackend`; one request, or a multipart upload."""
        path, content = self._at(name), b"".join(pieces)

        def put() -> None:
            try:
                self._fs.pipe_file(path, content)
            except FileNotFoundError:  # an upload whose end was done before and its answer lost; or no such bucket
                if self._ask(lambda: self._fs.info(path))["size"] != len(content):
                    raise

        self._ask(put)

    def put_if_absent(self, name: str, content: Any) -> bool:
        """See `StorageBackend`; by a condition that the server checks. After an unclear answer the server is asked who won."""
        path, content = self._at(name), bytes(content)
        for pause in (*_PAUSES, None):
            try:
                self._fs.pipe_file(path, content, mode="create")
                return True
            except PermissionError:
                raise
            except Exception as error:
                with suppress(FileNotFoundError):
                    return self.read(name) == content
                if pause is None:
                    raise _as_os_error(error) from error
            time.sleep(pause)
        raise AssertionError

    def delete(self, name: str) -> None:
        """See `StorageBackend`."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self._fs.rm_file(self._at(name)))


def open_storage(location: str | os.PathLike[str]) -> StorageBackend:
    """The place of a folder or URL.

    Raises:
        StoreError: no package here that opens such a URL.
    """
    text = os.fspath(location)
    local = next((text.removeprefix(scheme) for scheme in _LOCAL if text.startswith(scheme)), None)
    if local is not None or "://" not in text:
        return LocalStorage(os.path.abspath(text if local is None else local))
    return ObjectStorage(text.rstrip("/"))


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


def _as_os_error(error: Exception) -> OSError:
    """Clients have errors of their own for a server that does not answer."""
    return error if isinstance(error, OSError) else OSError(errno.EREMOTEIO, f"{type(error).__name__}: {error}")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _sync(folder: str) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
