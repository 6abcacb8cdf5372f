"""Where a feature store keeps its files."""

from mova_core.features.storage.base import Bucket, LocalFolder, Place, StoreError, place_at, writing

__all__ = ["Bucket", "LocalFolder", "Place", "StoreError", "place_at", "writing"]
