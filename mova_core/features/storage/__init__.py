"""Where a feature store keeps its files: a local folder, or a bucket or folder of any filesystem that fsspec knows."""

import os

from mova_core.features.storage.base import StorageBackend, StoreError, writing
from mova_core.features.storage.local import LocalStorage
from mova_core.features.storage.object_store import ObjectStorage
from mova_core.io.uris import local_path

__all__ = ["LocalStorage", "ObjectStorage", "StorageBackend", "StoreError", "open_storage", "writing"]


def open_storage(location: str | os.PathLike[str]) -> StorageBackend:
    """The storage backend for a folder or URL.

    Raises:
        StoreError: no installed package opens such a URL, or this system cannot read local stores.
    """
    path = local_path(location)
    if path is None:
        return ObjectStorage(os.fspath(location).rstrip("/"))
    return LocalStorage(os.path.abspath(path))
