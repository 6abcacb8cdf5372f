"""Features as data: where they come from (`FeatureSource`), and the store that keeps them.

Importing this package imports no torch, so that `mova store ls` and `stat` are instant; torch is imported with the first
tensor.
"""

from typing import TYPE_CHECKING, Any

from mova_core.features.errors import MissingFeatures
from mova_core.features.lazy_experts import LazyExperts
from mova_core.features.partition import FeaturePartition, Shard
from mova_core.features.source import FeatureSource, LocalExperts
from mova_core.features.storage import StoreError
from mova_core.features.store import FeatureStore
from mova_core.features.tiered import ReadThroughStore, Tiered

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
    "ReadThroughStore",
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
