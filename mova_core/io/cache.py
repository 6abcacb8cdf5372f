"""The one folder of this user for files that can be fetched or computed again."""

import errno
import logging
import os
from pathlib import Path

import platformdirs

logger = logging.getLogger(__name__)
_reported: set[Path] = set()  # folders that a warning has named


def cache_folder(name: str) -> Path:
    """`$MOVA_CACHE/<name>` where MOVA_CACHE is set, else `<the user's cache folder>/mova/<name>` (on Linux ~/.cache).

    Files of a cache may be deleted at any time while no command of MoVA runs. The folder need not exist yet. Where home
    folders lie on a network disk, let MOVA_CACHE name a folder on a local disk.

    Args:
        name: one folder for each kind of content, such as "fetched" or "indexes".
    """
    return Path(os.environ.get("MOVA_CACHE") or platformdirs.user_cache_path("mova", appauthor=False)) / name


def private_folder(path: Path) -> Path:
    """Creates a folder that only this user may enter (mode 0700), or checks one that exists.

    What others can write is not trusted: a file planted in a cache would be taken for what was fetched.

    Raises:
        PermissionError: the folder belongs to another user, or others may write to it; a warning names it once.
        OSError: it cannot be created.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    owners = {path.lstat().st_uid, path.stat().st_uid}  # of a link too
    mode = path.stat().st_mode
    reason = "it belongs to another user" if owners != {os.getuid()} else ""
    if not reason and mode & 0o022:
        reason = "others may write to it (chmod 700 mends that, once its content is deleted)"
    if reason:
        if path not in _reported:
            _reported.add(path)
            logger.warning("the cache folder %s is not used: %s; or set MOVA_CACHE to another folder", path, reason)
        raise PermissionError(errno.EACCES, reason, str(path))
    if mode & 0o077:  # of an earlier version
        path.chmod(0o700)
    return path
