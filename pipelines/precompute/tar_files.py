"""Pictures in tars, of which only the headers are read."""

from collections.abc import Callable
from tarfile import BLOCKSIZE, TarError, TarFile
from typing import Any

from mova_core.io.uris import Member

# First bytes of compressed files -> what unpacks them.
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
CHUNK_BLOCKS = 128  # read at once between two tars in one file


class TrailingData(TarError):
    """What follows a whole tar is none; `members` holds the locators of the pictures before it."""

    members: list[str]


def tar_members(file: str, opened: Any, is_picture: Callable[[str], bool]) -> list[str]:
    """Locators of the pictures in a tar, also of those in further tars that were appended to it (`cat a.tar b.tar`).

    Args:
        file: path or URL of the tar.
        opened: the tar, opened for reading bytes.
        is_picture: tells by a member's name.

    Raises:
        TrailingData: something else follows a whole tar.
        TarError: compressed, cut off, or no tar.
    """
    head = opened.read(6)
    if tool := next((tool for magic, tool in _PACKED.items() if head.startswith(magic)), None):
        raise TarError(f"compressed, so that no member can be read alone: unpack it with {tool}")
    members: list[str] = []
    start: int | None = 0
    while start is not None:
        opened.seek(start)
        whole = len(members)
        try:
            end = _of_one_tar(file, opened, is_picture, members)
        except TarError as error:
            if not start:
                raise
            trailing = TrailingData(f"after a whole tar, at byte {start:,}: {error}")
            trailing.members = members[:whole]
            raise trailing from None
        start = _next_tar(opened, end)
    return members


def _of_one_tar(file: str, opened: Any, is_picture: Callable[[str], bool], members: list[str]) -> int:
    """Appends the pictures of the tar at the present position; returns where its members end."""
    end = opened.tell()
    with TarFile(fileobj=opened) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps them all
            end = member.offset_data + (-(-member.size // BLOCKSIZE) * BLOCKSIZE if member.isreg() else 0)
            if member.isreg() and not member.issparse() and is_picture(member.name):
                members.append(str(Member(file, member.name, member.offset_data, member.size)))
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
