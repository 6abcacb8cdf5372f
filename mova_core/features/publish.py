"""How the store puts files down: complete, synced, and under a name that only one of any number of writers gets."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


class StoreError(RuntimeError):
    """Something is wrong with a store: one line that names the thing and the fix."""


def put_if_absent(path: Path, content: Any | Callable[[BinaryIO], object]) -> bool:
    """Publishes bytes, or what a function writes, by link(2), which never replaces; False where the name was taken."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parquet(table: pa.Table) -> pa.Buffer:
    """A Parquet file of the table, its pages checksummed; in memory, so that a full disk shows as the error it is."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def finished(folder: Path, suffix: str) -> list[str]:
    """The names of a folder's published files."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # copying tools drop empty folders
        return []
    return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))


_FIXES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "raise its quota",
    errno.EFBIG: "raise the file size limit",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable for this user",
    errno.ENOTDIR: "give a folder",
    errno.EPERM: "put it on a file system with hard links",
    errno.EOPNOTSUPP: "put it on a file system with hard links",
}


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line with the fix."""
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "check that disk")
        raise StoreError(
            f"cannot write to store {store} ({error.strerror or error}): {fix}, then run the same command again; "
            f"what was committed is intact"
        ) from error
