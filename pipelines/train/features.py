"""Where a run's features come from: the store, the store with experts behind it for what it lacks, or experts alone."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mova_core.experts import BASE
from mova_core.experts import fingerprint as fingerprint_of
from mova_core.features import FeaturePartition, FeatureSource, FeatureStore, LazyExperts, ReadThroughStore
from mova_core.model import MoVAForConditionalGeneration
from pipelines.train.config import TrainConfig


def stored_base(store: FeatureStore | None, model: MoVAForConditionalGeneration) -> FeaturePartition | None:
    """Where the store holds what a frozen base encoder would compute again in every epoch.

    Returns:
        None where the base encoder learns, or the store has no features of exactly its weights.
    """
    if store is None or any(parameter.requires_grad for parameter in model.base_encoder.parameters()):
        return None
    partitions = [store.partition(BASE, fingerprint) for fingerprint in store.experts().get(BASE, ())]
    # The dtype that features were computed in is part of their weights' hash; a store may narrow it again.
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if partitions else ():
        described = copy.deepcopy(model.base_encoder).to(dtype).describe()
        for partition in partitions:
            if fingerprint_of(described | {"dtype": partition.description["dtype"]}) == partition.fingerprint:
                return partition
    return None


@contextmanager
def open_features(
    config: TrainConfig, store: FeatureStore | None, model: Any, device: torch.device
) -> Iterator[FeatureSource]:
    """The source of `config.features`, and the weights that it serves written into `model.pool`.

    Args:
        store: None only where the features are "online".
        device: of the experts.

    Raises:
        StoreError: "store", which has no features of an expert of the pool.
        ValueError: an expert's weights are not those of the store or the model.
    """
    if config.features == "store":
        assert store is not None
        served = {name: store.partition(name) for name in model.experts}
        _pin(model, {name: (partition.fingerprint, partition.description) for name, partition in served.items()})
        yield store
        return
    stored = store.fingerprints if store is not None else {}
    experts = LazyExperts(
        model.experts,
        size=model.expert_size,
        weights=config.weights,
        fingerprints=stored | model.fingerprints,
        device=str(device),
        dtypes=model.feature_dtypes,
    )
    experts.load(name for name in model.experts if name not in experts.fingerprints)
    described: dict[str, tuple[str, Any]] = {}
    for name, fingerprint in experts.fingerprints.items():
        partition = store.find_partition(name, fingerprint) if store is not None else None
        description = experts.descriptions.get(name) if partition is None else partition.description
        described[name] = fingerprint, description or {}
    _pin(model, described)
    if store is None:
        yield experts
        return
    with ReadThroughStore(store, experts) as source:
        yield source


def _pin(model: Any, served: dict[str, tuple[str, Any]]) -> None:
    """Writes fingerprint and dtype of every expert's features into the model's pool: it must be used with no others."""
    for expert in model.pool:
        fingerprint, description = served[expert["name"]]
        expert["fingerprint"] = fingerprint
        if dtype := description.get("dtype"):
            expert["dtype"] = dtype
