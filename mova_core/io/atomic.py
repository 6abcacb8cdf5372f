"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

Temporary names start with a dot and end in `.tmp`; no two processes or threads ever share one.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], content: bytes | bytearray | memoryview | str) -> None:
    """Writes a file so that readers see the former content or the new content, never a part of either.

    Args:
        path: replaced if the file exists; its folder must exist.
        content: bytes, or text that is stored as UTF-8.

    Raises:
        OSError: the file cannot be written; a file that existed before is unchanged.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends without an exception.

    The block creates a file or a folder at the temporary path. After an exception the temporary path is deleted and
    `path` is unchanged. A file replaces a file in one step. A folder replaces a folder in two renames, because POSIX
    cannot exchange full folders: a process killed between the two leaves the former folder beside the new one, under a
    temporary name, and nothing at `path`.

    Args:
        path: its folder must exist.
        durable: flush to disk before the rename, so that a power cut cannot leave an empty file under the final name.

    Raises:
        OSError: the temporary path cannot be written or renamed.
    """
    target = Path(path)
    temporary = temporary_path(target)
    try:
        yield temporary
        if durable:
            _flush_all(temporary)
        if temporary.is_dir() and target.is_dir():
            _replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
        if durable:
            flush(target.parent)
    except BaseException:
        _delete(temporary)
        raise


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """A path in the same folder that no other process or thread uses."""
    path = Path(path)
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")


def flush(folder: str | os.PathLike[str]) -> None:
    """Makes names created, replaced or deleted in a folder survive a power cut (POSIX requires a flush of the folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(path: Path) -> None:
    """Flushes a file, or all files and folders of a folder, to disk."""
    if not path.is_dir():
        flush(path)  # fsync(2) takes a read-only descriptor of a file just as well
        return
    for folder, _, names in os.walk(path):
        for name in names:
            flush(os.path.join(folder, name))
        flush(folder)


def _replace_folder(temporary: Path, target: Path) -> None:
    former = temporary_path(target)
    os.rename(target, former)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(former, target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
