"""Where a feature store keeps its files."""

import os

from mova_core.features.storage.base import StorageBackend, StoreError, writing
from mova_core.features.storage.local import LocalStorage
from mova_core.features.storage.object_store import ObjectStorage

__all__ = ["LocalStorage", "ObjectStorage", "StorageBackend", "StoreError", "open_storage", "writing"]

_LOCAL = ("file://", "local://")


def open_storage(location: str | os.PathLike[str]) -> StorageBackend:
    """The place of a folder or URL.

    Raises:
        StoreError: no package here that opens such a URL.
    """
    text = os.fspath(location)
    local = next((text.removeprefix(scheme) for scheme in _LOCAL if text.startswith(scheme)), None)
    if local is not None or "://" not in text:
        return LocalStorage(os.path.abspath(text if local is None else local))
    return ObjectStorage(text.rstrip("/"))
