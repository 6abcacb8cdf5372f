"""What was fetched from elsewhere, kept once per machine for all its processes.

MOVA_CACHE       see `mova_core.io.cache`
MOVA_CACHE_GB    most of it, in GB (1e9 bytes); what was used longest ago goes first; default 10, 0 keeps nothing
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
from mova_core.io.cache import cache_folder

ABANDONED_S = 3600.0  # a temporary file older than this has lost its writer


class NodeCache:
    """A folder of immutable objects, each made by one process of the machine while the others wait for it.

    It is only a cache: whatever goes wrong with its disk, callers get what they asked for.

    Args:
        folder: made if it is not there.
        limit: most bytes kept.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit

    @classmethod
    def of_this_node(cls) -> "NodeCache":
        """The one that the environment asks for."""
        return cls(cache_folder("fetched"), int(float(os.environ.get("MOVA_CACHE_GB") or 10) * 1e9))

    def get(self, name: str, make: Callable[[], bytes], newer_than: float = 0.0) -> pa.Buffer:
        """What `make` gave for this name, in this process or another one; memory-mapped where it was kept.

        Args:
            name: of any length.
            newer_than: seconds since 1970; what was made before is made again.
        """
        digest = hashlib.sha256(name.encode()).hexdigest()
        path, locks = self.folder / "objects" / digest, self.folder / "locks"
        with contextlib.ExitStack() as held:
            try:
                for folder in (path.parent, locks):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if (found := _kept(path, newer_than)) is not None:
                    return found
                held.enter_context(FileLock(locks / digest[:3]))  # 4096 for all names, so that none need be removed
            except OSError:
                return pa.py_buffer(make())
            if (found := _kept(path, newer_than)) is not None:  # another one made it meanwhile
                return found
            content = make()
            with contextlib.suppress(OSError):
                self._keep(path, content)
            return pa.py_buffer(content)

    def _keep(self, path: Path, content: bytes) -> None:
        if not 0 < len(content) <= self.limit // 4:
            return
        with atomic_path(path, durable=False) as temporary:
            temporary.write_bytes(content)
        used = self.folder / "used"
        with FileLock(self.folder / "locks" / "used"):
            try:
                total = int(used.read_text()) + len(content)
            except (OSError, ValueError):  # not there, or cut off by a full disk
                total = self.limit + 1
            if total > self.limit:
                total = self._evict()
            used.write_text(str(total))

    def _evict(self) -> int:
        """Removes what was used longest ago until a tenth of the limit is free. Returns the bytes that stay."""
        found = []
        for entry in os.scandir(self.folder / "objects"):
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                found.append((stat.st_atime, stat.st_size, entry.path))
        total, abandoned = sum(size for _, size, _ in found), time.time() - ABANDONED_S
        for used, size, path in sorted(found):
            if total <= self.limit * 0.9:
                break
            if not path.endswith(".tmp") or used < abandoned:
                Path(path).unlink(missing_ok=True)
                total -= size
        return total


def _kept(path: Path, newer_than: float) -> pa.Buffer | None:
    try:
        made = path.stat().st_mtime
        if made < newer_than:
            return None
        os.utime(path, (time.time(), made))  # who evicts goes by the time of access, which many disks do not keep
        with pa.memory_map(str(path)) as file:
            return file.read_buffer()
    except OSError:  # not there, or evicted this moment
        return None
