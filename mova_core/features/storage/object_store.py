"""A store in a bucket, or in a folder of any other filesystem that fsspec knows."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mova_core.features.storage.base import StorageBackend, StoreError

_PAUSES = (0.1, 0.4, 1.6, 6.4)  # seconds between attempts at a server, beyond those of its own client
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)


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


def _as_os_error(error: Exception) -> OSError:
    """Clients have errors of their own for a server that does not answer."""
    return error if isinstance(error, OSError) else OSError(errno.EREMOTEIO, f"{type(error).__name__}: {error}")
