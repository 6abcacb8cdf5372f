"""The members of tars, of which only the headers are read; a file may hold several tars (`cat a.tar b.tar`)."""

from collections.abc import Callable, Generator, Iterator
from tarfile import BLOCKSIZE, TarError, TarFile, TarInfo
from typing import Any

from mova_core.io.uris import Member

# First bytes of compressed files -> what unpacks them.
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
CHUNK_BLOCKS = 128  # read at once between two tars in one file
HEADERS = 128 * 1024  # bytes fetched at a time of a remote tar, whose headers alone are wanted


class TrailingData(TarError):
    """What follows a whole tar is none.

    Attributes:
        start: its first byte in the file.
        members: what `tar_members` found before it.
    """

    start: int
    members: list[str]


def tar_members(file: str, opened: Any, is_picture: Callable[[str], bool]) -> list[str]:
    """Locators of the pictures in a tar, also of those in further tars that were appended to it.

    Args:
        file: path or URL of the tar.
        opened: the tar, opened for reading bytes.
        is_picture: tells by a member's name.

    Raises:
        TrailingData: something else follows a whole tar.
        TarError: compressed, cut off, or no tar.
    """
    found: list[TarInfo] = []
    try:
        for member in iterate_members(opened):
            if is_picture(member.name):
                found.append(member)
    except TrailingData as error:
        error.members = [_locator(file, member) for member in found if member.offset < error.start]
        raise
    return [_locator(file, member) for member in found]


def iterate_members(opened: Any) -> Iterator[TarInfo]:
    """The regular files of a tar, and of tars appended to it, with `offset`, `offset_data` and `size` in the file.

    The position in `opened` may be moved between two members.

    Raises:
        TrailingData, TarError: as `tar_members`.
    """
    head = opened.read(6)
    if tool := next((tool for magic, tool in _PACKED.items() if head.startswith(magic)), None):
        raise TarError(f"compressed, so that no member can be read alone: unpack it with {tool}")
    start: int | None = 0
    while start is not None:
        opened.seek(start)
        try:
            end = yield from _of_one_tar(opened)
        except TarError as error:
            if not start:
                raise
            trailing = TrailingData(f"after a whole tar, at byte {start:,}: {error}")
            trailing.start, trailing.members = start, []
            raise trailing from None
        start = _next_tar(opened, end)


def end_of(member: TarInfo) -> int:
    """Where the blocks of a member end in the file."""
    return int(member.offset_data + (-(-member.size // BLOCKSIZE) * BLOCKSIZE if member.isreg() else 0))


def _locator(file: str, member: TarInfo) -> str:
    return str(Member(file, member.name, member.offset_data, member.size))


def _of_one_tar(opened: Any) -> Generator[TarInfo, None, int]:
    """Yields the members of the tar at the present position; returns where they end."""
    end = opened.tell()
    with TarFile(fileobj=opened) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps them all
            end = end_of(member)
            if member.isreg() and not member.issparse():
                yield member
    opened.seek(end)
    if (block := opened.read(BLOCKSIZE)) != bytes(BLOCKSIZE):  # TarFile takes whatever it does not know for the end
        raise TarError("cut off" if len(block) < BLOCKSIZE else f"no header where one should be, at byte {end:,}")
    return end


def _next_tar(opened: Any, start: int) -> int | None:
    """Where the blocks of zeros that end a tar are followed by another block; None where the file ends."""
    opened.seek(start)
    while chunk := opened.read(CHUNK_BLOCKS * BLOCKSIZE):
        if rest := chunk.lstrip(b"\0"):
            skipped = len(chunk) - len(rest)
            return start + skipped // BLOCKSIZE * BLOCKSIZE
        start += len(chunk)
    return None
