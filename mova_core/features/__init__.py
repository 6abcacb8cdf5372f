"""Features as data: where they come from (`FeatureSource`), and the store that keeps them.

Importing this imports no torch, so that `mova store ls` and `stat` are instant; it comes with the first tensor.
"""

from typing import TYPE_CHECKING, Any

from mova_core.features.source import FeatureSource, LazyExperts, LocalExperts, Tiered
from mova_core.features.store import FeaturePartition, FeatureStore, MissingFeatures, Shard, StoreError

if TYPE_CHECKING:
    from mova_core.experts import Features
    from mova_core.features.dataset import FeatureBatches, FeatureReader

__all__ = [
    "FeatureBatches",
    "FeaturePartition",
    "FeatureReader",
    "FeatureSource",
    "FeatureStore",
    "Features",
    "LazyExperts",
    "LocalExperts",
    "MissingFeatures",
    "Shard",
    "StoreError",
    "Tiered",
]


def __getattr__(name: str) -> Any:
    if name == "Features":
        from mova_core.experts import Features

        return Features
    if name in ("FeatureBatches", "FeatureReader"):
        from mova_core.features import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
