"""Locators: one string that addresses an image anywhere, and the bytes it stands for.

    /data/a.png                        a local file
    s3://bucket/a.png                  a file of any filesystem that fsspec knows: s3, gs, https, memory, ...
    /data/x.tar#a.png@1536+20480       a member of a tar, local or remote: its name, where its bytes start, how many
    /data/x.parquet#image[3,17]        a cell of a Parquet file, local or remote: column, row group, row in that group

What is remote is fetched once per machine (see `node_cache`): files whole, members of tars by their range of bytes, cells
with all others of their row group and column.
"""

import errno
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mova_core.io.node_cache import NodeCache

MAX_BYTES = 512 * 2**20  # of one encoded image
ATTEMPTS = 4
PAUSE_S = 0.5  # before the second attempt; twice as long before each that follows
CONNECT_S, SILENCE_S = 15, 60  # longest that an HTTP server may take to answer, and pause in the middle

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MEMBER = re.compile(r"(.+?\.tar)#(.*)@(\d+)\+(\d+)", re.DOTALL)
_CELL = re.compile(r"(.+?\.parquet)#(.*)\[(\d+),(\d+)\]", re.DOTALL)
_CHANGES = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")

T = TypeVar("T")


class ReadError(OSError):
    """Bytes that cannot be had now; the message says why, without the locator. They may come back."""


class NotFoundError(ReadError, FileNotFoundError):
    """There is nothing at this place."""


class Member(NamedTuple):
    """Where a member of a tar lies in it."""

    file: str
    name: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.file}#{self.name}@{self.offset}+{self.length}"


class Cell(NamedTuple):
    """Where in a Parquet file a value stands."""

    file: str
    column: str
    group: int
    row: int

    def __str__(self) -> str:
        return f"{self.file}#{self.column}[{self.group},{self.row}]"


def parse(locator: str) -> Member | Cell | str:
    """What a locator addresses; a file's own path or URL stays as it is."""
    if "#" in locator:
        if found := _MEMBER.fullmatch(locator):
            return Member(found[1], found[2], int(found[3]), int(found[4]))
        if found := _CELL.fullmatch(locator):
            return Cell(found[1], found[2], int(found[3]), int(found[4]))
    return locator


def is_url(path: str | os.PathLike[str]) -> bool:
    return _URL.match(os.fspath(path)) is not None


def absolute(path: str | os.PathLike[str]) -> str:
    """The same in every process: a URL as it is, a path from the root, its folders without links."""
    path = os.fspath(path).removeprefix("file://")
    if is_url(path):
        return path
    path = os.path.join(os.getcwd(), path)
    folder, name = os.path.split(path)
    return os.path.join(_real(folder), name) if name not in ("", ".", "..") else _real(path)


_real = lru_cache(maxsize=4096)(os.path.realpath)  # a call to the disk for each step of the path


def joined(folder: str | os.PathLike[str], name: str) -> str:
    """A name relative to a folder, either of which may be a URL."""
    if is_url(name) or not is_url(folder):
        return name if is_url(name) else os.path.join(folder, name)
    return f"{os.fspath(folder).rstrip('/')}/{name.lstrip('/')}"


def parent(path: str | os.PathLike[str]) -> str:
    """The folder a file stands in, a URL for a URL."""
    return os.fspath(path).rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path in it.

    Raises:
        Unavailable: no filesystem is known or installed for it.
    """
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=SILENCE_S)}}
    try:
        return url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ReadError(f"cannot be read ({_said(error)})") from error


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A local or remote file, of whatever size, not kept.

    Raises:
        OSError: it cannot be read; FileNotFoundError where it is not there.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            return file.read()
    system, inside = filesystem(os.fspath(path))
    return with_retries(lambda: system.cat_file(inside))


def read(locator: str, newer_than: float = 0.0) -> bytes:
    """The bytes that a locator stands for.

    Args:
        newer_than: seconds since 1970; what this machine fetched before is fetched again.

    Raises:
        Unavailable: not there, not reachable after some attempts, or larger than `MAX_BYTES`.
    """
    place = parse(locator)
    if isinstance(place, Cell):
        return _cell(place, newer_than)
    file = place.file if isinstance(place, Member) else place
    if isinstance(place, Member):
        _check_size(place.length)
    if is_url(file):
        return (
            NodeCache.of_this_node()
            .get(locator, lambda: with_retries(lambda: _fetched(place)), newer_than)
            .to_pybytes()
        )
    try:
        with open(file, "rb") as opened:
            if isinstance(place, Member):
                return _whole(os.pread(opened.fileno(), place.length, place.offset), place)
            _check_size(os.fstat(opened.fileno()).st_size)
            return opened.read()
    except ReadError:
        raise
    except OSError as error:
        raise _unavailable(error) from error


def version(locator: str) -> str | None:
    """Something that changes when the bytes change, without reading them: size and time or ETag; None where nobody tells.

    Raises:
        Unavailable: as `read`.
    """
    place = parse(locator)
    file = place if isinstance(place, str) else place.file
    if not is_url(file):
        try:
            found = os.stat(file)
        except OSError as error:
            raise _unavailable(error) from error
        return f"{found.st_size} {found.st_mtime_ns}"

    def info() -> dict[str, Any]:
        system, path = filesystem(file)
        return system.info(path)

    told = with_retries(info)
    change = next((told[name] for name in _CHANGES if told.get(name)), None)
    return None if change is None else f"{told.get('size')} {change}"


def with_retries(fetch: Callable[[], T]) -> T:
    """What `fetch` gives, tried again where the network failed it.

    Raises:
        Unavailable: it failed for good, or at every attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except ReadError:
            raise
        except Exception as error:
            if not _passes(error):
                raise _unavailable(error) from error
            if attempt + 1 == ATTEMPTS:
                reason = _said(error.__cause__ or error)
                raise ReadError(f"could not be fetched in {ATTEMPTS} attempts ({reason})") from error
            time.sleep(PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _fetched(place: Member | str) -> bytes:
    if isinstance(place, Member):
        system, path = filesystem(place.file)
        return _whole(system.cat_file(path, start=place.offset, end=place.offset + place.length), place)
    system, path = filesystem(place)
    size = system.info(path).get("size")
    if size is not None:
        _check_size(size)
        return system.cat_file(path)
    content = io.BytesIO()
    with system.open(path, "rb") as file:  # a server that does not tell how much it will send
        while chunk := file.read(2**20):
            content.write(chunk)
            _check_size(content.tell())
    return content.getvalue()


def _whole(content: bytes, place: Member) -> bytes:
    if len(content) != place.length:
        raise ReadError(f"cannot be read (it has {len(content):,} of {place.length:,} bytes: the tar has changed)")
    return content


def _cell(place: Cell, newer_than: float) -> bytes:
    with _one_at_a_time:  # threads that want neighbours wait for one to decode them
        stamp = 0
        if not is_url(place.file):
            try:
                stamp = os.stat(place.file).st_mtime_ns
            except OSError as error:
                raise _unavailable(error) from error
        values = _row_group(place.file, place.column, place.group, stamp, newer_than)
    if place.row >= len(values):
        raise ReadError(f"cannot be read (its row group has {len(values)} rows: the Parquet file has changed)")
    value = values[place.row].as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return read(joined(parent(place.file), value), newer_than)
    if value is None:
        raise ReadError("cannot be read (the cell is empty)")
    _check_size(len(value))
    return value


_one_at_a_time = threading.Lock()


@lru_cache(maxsize=2)
def _row_group(file: str, column: str, group: int, stamp: int, newer_than: float) -> pa.ChunkedArray:
    """One column of a row group; `stamp` tells a file that was replaced from the one before."""

    def decoded(source: Any) -> pa.Table:
        try:
            parquet = pq.ParquetFile(source)
            if column not in parquet.schema_arrow.names:
                raise IndexError(f"the Parquet file has no column {column!r} any more")
            return parquet.read_row_group(group, columns=[column])
        except (pa.ArrowException, IndexError) as error:
            raise ReadError(f"cannot be read ({_said(error)})") from error

    if not is_url(file):
        try:
            return decoded(file)[0]
        except ReadError:
            raise
        except OSError as error:
            raise _unavailable(error) from error

    def fetched() -> bytes:
        system, path = filesystem(file)
        with system.open(path, "rb") as opened:
            table = decoded(opened)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    name = f"{file}#{column}[{group}]"
    kept = NodeCache.of_this_node().get(name, lambda: with_retries(fetched), newer_than)
    return pa.ipc.open_file(kept).read_all()[0]


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ReadError(f"{size:,} bytes are over the limit of {MAX_BYTES:,}")


def _passes(error: BaseException) -> bool:
    """Could it be another way a moment later?"""
    cause = (
        error.__cause__ or error
    )  # the HTTP filesystem says "not found" of whatever went wrong, and what it was here
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 425, 429)
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return False
    if isinstance(cause, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)):
        return False
    return isinstance(cause, OSError) or type(cause).__module__.split(".")[0] in ("aiohttp", "botocore", "gcsfs")


def _unavailable(error: BaseException) -> ReadError:
    cause = error.__cause__ or error
    if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
        return NotFoundError(f"cannot be read ({os.strerror(errno.ENOENT)})")
    return ReadError(f"cannot be read ({_said(cause)})")


def _said(error: BaseException) -> str:
    """In one line, without the URL that stands beside it anyway."""
    if (status := getattr(error, "status", None)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__
