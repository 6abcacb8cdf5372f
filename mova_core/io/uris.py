"""Locators: one string that addresses an image anywhere.

    /data/a.png                        a local file
    s3://bucket/a.png                  a file of any filesystem that fsspec knows: s3, gs, https, memory, ...
    /data/x.tar#a.png@1536+20480       a member of a tar, local or remote: name, offset of its first byte, bytes
    /data/x.parquet#image[3,17]        a cell of a Parquet file, local or remote: column, row group, row in that group
    /data/x.parquet#images[3,17,2]     an item of such a cell that holds a list

This module handles strings only, and no other module looks for "://" in one. `mova_core.io.read` reads the bytes that a
locator addresses.
"""

import os
import re
from functools import lru_cache
from typing import NamedTuple

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Greedy, because a folder may be named "x.tar#1"; `Member` keeps ".tar#" out of the member's name.
_MEMBER = re.compile(r"(.+\.tar)#(.*)@(\d+)\+(\d+)", re.DOTALL | re.IGNORECASE)
_CELL = re.compile(r"(.+\.parquet)#(.*)\[(\d+),(\d+)(?:,(\d+))?\]", re.DOTALL | re.IGNORECASE)
_TAR_END = re.compile(r"(\.tar)#", re.IGNORECASE)
_LOCAL_SCHEMES = ("file://", "local://")


class Member(NamedTuple):
    """The bytes of one member within a tar file.

    Attributes:
        file: path or URL of the tar.
        name: of the member.
        offset, length: in bytes.
    """

    file: str
    name: str
    offset: int
    length: int

    def __str__(self) -> str:
        name = _TAR_END.sub(r"\1%23", self.name)  # it only informs: offset and length address the bytes
        return f"{self.file}#{name}@{self.offset}+{self.length}"


class Cell(NamedTuple):
    """The position of one value within a Parquet file.

    Attributes:
        file: path or URL of the Parquet file.
        column: its name.
        group: number of the row group.
        row: number of the row within its row group.
        item: number of the value within the list that the cell holds; None where it holds no list.
    """

    file: str
    column: str
    group: int
    row: int
    item: int | None = None

    def __str__(self) -> str:
        item = "" if self.item is None else f",{self.item}"
        return f"{self.file}#{self.column}[{self.group},{self.row}{item}]"


def parse(locator: str) -> Member | Cell | str:
    """The tar member or Parquet cell that a locator addresses; the path or URL of a whole file is returned unchanged."""
    if "#" in locator:
        if match := _MEMBER.fullmatch(locator):
            return Member(match[1], match[2], int(match[3]), int(match[4]))
        if match := _CELL.fullmatch(locator):
            item = None if match[5] is None else int(match[5])
            return Cell(match[1], match[2], int(match[3]), int(match[4]), item)
    return locator


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path starts with a URL's scheme, as in `s3://`."""
    return _URL.match(os.fspath(path)) is not None


def scheme(path: str | os.PathLike[str]) -> str:
    """The scheme of a URL in lower case, as "s3"; empty for a path."""
    match = _URL.match(os.fspath(path))
    return match[1].lower() if match else ""


def local_path(path: str | os.PathLike[str]) -> str | None:
    """The path on this machine: a path unchanged, `file://` and `local://` removed; None for any other URL."""
    path = os.fspath(path)
    for prefix in _LOCAL_SCHEMES:
        path = path.removeprefix(prefix)
    return None if is_url(path) else path


def absolute(path: str | os.PathLike[str]) -> str:
    """A path or URL that means the same in every process of this machine.

    A URL is returned unchanged, except that `file://` is removed. A path becomes absolute and its folders free of
    symbolic links; a link in its last part stays.
    """
    local = local_path(path)
    if local is None:
        return os.fspath(path)
    local = os.path.join(os.getcwd(), local)
    folder, name = os.path.split(local)
    return os.path.join(_real_path(folder), name) if name not in ("", ".", "..") else _real_path(local)


# Cached because realpath asks the disk about every step of a path, and most images share few folders.
_real_path = lru_cache(maxsize=4096)(os.path.realpath)


def joined(folder: str | os.PathLike[str], name: str) -> str:
    """A name relative to a folder; both may be paths or URLs, and an absolute name is returned unchanged."""
    if is_url(name) or not is_url(folder):
        return name if is_url(name) else os.path.join(folder, name)
    return f"{os.fspath(folder).rstrip('/')}/{name.lstrip('/')}"


def parent(path: str | os.PathLike[str]) -> str:
    """The folder that holds a file; a URL for a URL."""
    return os.fspath(path).rpartition("/")[0] if is_url(path) else os.path.dirname(path)
