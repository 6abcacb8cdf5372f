"""Where features come from: one protocol, and the experts of this process as its simplest source.

Other sources: `LazyExperts` (experts loaded when first requested), `FeatureStore` (features computed before),
`ReadThroughStore` (a store in front of another source) and `actors.expert_pool.ExpertPool` (live servers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mova_core.images import DecodedImage

if TYPE_CHECKING:
    from mova_core.experts import Features, VisionExpert
    from mova_core.images import ImageRef


class FeatureSource(Protocol):
    """(images, expert names) -> features; its users cannot tell which kind of source they hold."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served."""
        ...

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """The features of images[i] by each of experts[i]: name -> Features with tokens (H*W, C), on the CPU."""
        ...


def wanted_by_expert(images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> dict[str, dict[str, ImageRef]]:
    """Expert -> {image key: image}, each image once, in the order of the request."""
    wanted: dict[str, dict[str, ImageRef]] = {}
    for image, names in zip(images, experts, strict=True):
        for name in names:
            wanted.setdefault(name, {})[image.key] = image
    return wanted


class LocalExperts:
    """Runs experts in this process, each on the device it is on.

    Args:
        experts: name -> expert.
        batch_size: images per forward pass.
    """

    def __init__(self, experts: Mapping[str, VisionExpert], batch_size: int = 8):
        self.experts = dict(experts)
        self.batch_size = batch_size
        self._descriptions: dict[str, dict[str, Any]] = {}

    @property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Expert name -> all that its fingerprint covers."""
        if missing := self.experts.keys() - self._descriptions.keys():
            # A new dictionary: other threads may be iterating over the old one.
            described = {name: self.experts[name].describe() for name in missing}
            self._descriptions = {**self._descriptions, **described}
        return self._descriptions

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served."""
        from mova_core.experts import fingerprint

        return {name: fingerprint(description) for name, description in self.descriptions.items()}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`. An image requested twice is computed once, and decoded once for all its experts.

        Raises:
            ValueError: an expert that this source does not have.
            ImageError: an image that cannot be read.
        """
        import torch

        from mova_core.experts import Features

        computed: dict[str, dict[str, Features]] = {}
        by_expert = wanted_by_expert(images, experts)
        expert_counts = Counter(key for wanted in by_expert.values() for key in wanted)
        decoded = {image.key: DecodedImage.of(image) for image in images if expert_counts[image.key] > 1}
        for name, wanted in by_expert.items():
            if name not in self.experts:
                raise ValueError(f"no expert {name!r} here: there are {', '.join(self.experts)}")
            expert = self.experts[name]
            parameter = next(expert.parameters())
            keys = list(wanted)
            rows = computed[name] = {}
            for begin in range(0, len(keys), self.batch_size):
                chunk = keys[begin : begin + self.batch_size]
                batch = expert.preprocess([decoded.get(key, wanted[key]) for key in chunk])
                with torch.no_grad():  # not inference_mode: training saves these tensors for its backward pass
                    tokens_BNC, grid = expert({key: value.to(parameter) for key, value in batch.items()})
                rows.update(zip(chunk, (Features(tokens_NC, grid) for tokens_NC in tokens_BNC.cpu()), strict=True))
        return [
            {name: computed[name][image.key] for name in names} for image, names in zip(images, experts, strict=True)
        ]
