"""What can be wrong with a feature store, and whether it is damage or only a read that failed.

Damage is what reading again cannot mend: a file that is gone, ends too early or has other bytes than were committed. For
damage the message names `mova store verify`. Everything else that an operating system or a server refuses (too many
open files, no permission, no credentials, an I/O error) keeps the system's own reason, because the store may be sound.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mova_core.features.storage import StoreError
from mova_core.io.uris import is_url

_FIXES = {
    errno.EMFILE: "raise this process's limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise this machine's limit of open files (fs.file-max)",
    errno.ENOMEM: "free memory, or raise the number of mappings a process may have (vm.max_map_count)",
    errno.EACCES: "make it readable for this user",
    errno.EPERM: "make it readable for this user",
    errno.EIO: "check that disk; `mova store verify` lists what it cannot read any more",
    errno.ESTALE: "check that network file system",
}


class MissingFeatures(StoreError, LookupError):
    """Features that were requested and are not stored.

    Attributes:
        missing: (image key, expert) pairs.
    """

    def __init__(self, message: str, missing: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.missing = list(missing)

    @classmethod
    def of(cls, store: str, missing: Sequence[tuple[str, str]]) -> MissingFeatures:
        """The error for these (image key, expert) pairs."""
        counts = Counter(expert for _, expert in missing)
        return cls(
            f"store {store} lacks {len(missing)} of the features asked for "
            f"({', '.join(f'{expert}: {count}' for expert, count in counts.items())}): "
            f"run `mova precompute` on these images with --experts {','.join(counts)}",
            missing,
        )


class DamagedReceipt(ValueError):
    """A receipt whose bytes are not a receipt."""


class DamagedFeature(Exception):
    """A feature whose bytes in a shard are gone or differ from those committed.

    Attributes:
        position: of the feature in the sequence that was being read.
    """

    def __init__(self, reason: str, position: int):
        super().__init__(reason)
        self.position = position


def damage_in_words(error: Exception) -> str:
    """What is wrong with a file or a part of it, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if isinstance(error, EOFError):
        return "the file ends before it"
    return f"reading gives: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def is_lost(error: OSError, store: str) -> bool:
    """Whether the file itself is at fault, for a check that reads every byte from the disk.

    A local EIO is then a bad sector. A client of an object store reports EIO for any answer of the server that the client
    does not know, so for a URL only a missing object counts.
    """
    return isinstance(error, FileNotFoundError) or (error.errno == errno.EIO and not is_url(store))


@contextmanager
def reading(store: str) -> Iterator[None]:
    """Turns what the operating system or the server refuses into one line with its reason and the fix.

    Raises:
        StoreError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        if is_url(store):
            fix = "check that server, and the credentials and rights used"
        else:
            fix = _FIXES.get(error.errno or 0, "check that disk")
        reason = " ".join(str(error.strerror or error).split())
        raise StoreError(f"cannot read store {store} ({reason}): {fix}, then run the same command again") from error
