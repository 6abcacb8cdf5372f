"""Where a feature store keeps its files."""

from mova_core.features.storage.base import (
    LocalStorage,
    ObjectStorage,
    StorageBackend,
    StoreError,
    open_storage,
    writing,
)

__all__ = ["LocalStorage", "ObjectStorage", "StorageBackend", "StoreError", "open_storage", "writing"]
