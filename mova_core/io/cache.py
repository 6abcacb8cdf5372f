"""The one folder of this user for files that can be fetched or computed again."""

import os
from pathlib import Path

import platformdirs


def cache_folder(name: str) -> Path:
    """`$MOVA_CACHE/<name>` where MOVA_CACHE is set, else `<the user's cache folder>/mova/<name>` (on Linux ~/.cache).

    Files of a cache may be deleted at any time while no command of MoVA runs. The folder need not exist yet. Where home
    folders lie on a network disk, let MOVA_CACHE name a folder on a local disk.

    Args:
        name: one folder for each kind of content, such as "fetched" or "indexes".
    """
    return Path(os.environ.get("MOVA_CACHE") or platformdirs.user_cache_path("mova", appauthor=False)) / name
