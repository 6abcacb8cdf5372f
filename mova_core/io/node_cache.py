"""Remote bytes, cached once per machine for all processes of this user.

MOVA_CACHE       folder, see `mova_core.io.cache`
MOVA_CACHE_GB    limit in GB (1e9 bytes), above which the least recently used objects are evicted; default 10, 0 caches nothing

Written by hand for two reasons: diskcache unpickles what lies in its folder, and this project never unpickles files;
fsspec's filecache has no limit of size.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from mova_core.io.atomic import atomic_path
from mova_core.io.cache import cache_folder, private_folder

ABANDONED_S = 3600.0  # the writer of a temporary file older than this has died
LOCKS_HEX_DIGITS = 3  # 4096 lock files serve all names, so that no lock file need ever be deleted


class NodeCache:
    """A folder of immutable objects; of several processes that miss the same object, one fetches it and the others wait.

    An error of the cache's disk never reaches the caller: the object is fetched without the cache.

    Args:
        folder: created when first used. One that others can write is not used, because its content cannot be trusted.
        limit: of all objects together, in bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._objects, self._locks = self.folder / "objects", self.folder / "locks"

    @classmethod
    def of_this_node(cls) -> "NodeCache":
        """The cache that the environment variables describe."""
        return cls(cache_folder("fetched"), int(float(os.environ.get("MOVA_CACHE_GB") or 10) * 1e9))

    def get(self, name: str, fetch: Callable[[], bytes], newer_than: float = 0.0) -> pa.Buffer:
        """The object of this name: mapped from the cache, else what `fetch` returns.

        Args:
            name: of any length.
            fetch: called if the cache lacks the object; its exceptions are raised here, and nothing is cached.
            newer_than: seconds since 1970; objects fetched earlier are fetched again.
        """
        digest = hashlib.sha256(name.encode()).hexdigest()
        path = self._objects / digest
        with contextlib.ExitStack() as locked:
            try:
                self._create_folders()
                if (cached := _read(path, newer_than)) is not None:
                    return cached
                locked.enter_context(FileLock(self._locks / digest[:LOCKS_HEX_DIGITS]))
            except OSError:
                return pa.py_buffer(fetch())
            if (cached := _read(path, newer_than)) is not None:  # fetched by another process during the wait
                return cached
            content = fetch()
            with contextlib.suppress(OSError):
                self._put(path, content)
            return pa.py_buffer(content)

    def _create_folders(self) -> None:
        for folder in (self.folder, self._objects, self._locks):
            private_folder(folder)

    def _put(self, path: Path, content: bytes) -> None:
        if not 0 < len(content) <= self.limit // 4:  # a larger object would evict too many others
            return
        # Not durable: flushing would cost more than a fetch, and `_read` takes an empty file for a missing one.
        with atomic_path(path, durable=False) as temporary:
            temporary.write_bytes(content)
        used = self.folder / "used"  # bytes of all objects, so that not every `_put` has to list them
        with FileLock(self._locks / "used"):
            try:
                total = int(used.read_text()) + len(content)
            except (OSError, ValueError):  # missing, or cut off by a full disk
                total = self.limit + 1
            if total > self.limit:
                total = self._evict()
            used.write_text(str(total))

    def _evict(self) -> int:
        """Deletes the least recently used objects until a tenth of the limit is free. Returns the bytes that remain."""
        objects = []
        for entry in os.scandir(self._objects):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                objects.append((status.st_atime, status.st_size, entry.path))
        total = sum(size for _, size, _ in objects)
        abandoned = time.time() - ABANDONED_S
        for used, size, path in sorted(objects):
            if total <= self.limit * 0.9:
                break
            if not path.endswith(".tmp") or used < abandoned:
                Path(path).unlink(missing_ok=True)
                total -= size
        return total


def _read(path: Path, newer_than: float) -> pa.Buffer | None:
    """A cached object, mapped into memory; None if it is missing, empty or older than `newer_than`."""
    try:
        status = path.stat()
        if status.st_mtime < newer_than or not status.st_size:
            return None
        # Eviction goes by the time of access, which most disks do not update on reads.
        os.utime(path, (time.time(), status.st_mtime))
        with pa.memory_map(str(path)) as file:
            return file.read_buffer()
    except OSError:  # missing, or evicted at this moment
        return None
