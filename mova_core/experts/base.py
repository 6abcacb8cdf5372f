"""What every vision expert is: a card, a frozen network, its own preprocessing, and features on its native grid.

Shapes: B images, H x W the expert's native grid, N = H*W tokens, C channels.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from mova_core.images import ImageSource, PreprocessingMode

__all__ = ["ExpertCard", "Features", "VisionExpert", "fingerprint"]


class Features(NamedTuple):
    """Visual tokens of one expert, row-major on its native grid; the adapter aligns them to the base grid."""

    tokens: Tensor  # (B, H*W, C), or (H*W, C) for one image
    grid: tuple[int, int]  # (H, W)


@dataclass(frozen=True, kw_only=True)
class ExpertCard:
    """What the pool knows of an expert without building it."""

    name: str
    title: str  # as people call it, e.g. "DINOv2-giant"
    description: str  # the line the router reads (paper Table 2); names no model
    weights: str  # the public default: a hub id
    full: Mapping[str, Any]  # arch of the published expert (paper Table 12)
    mini: Mapping[str, Any]  # the same class with small numbers


class VisionExpert(nn.Module, ABC):
    """A vision expert. A subclass sets `card` and `preprocessing`, and writes `preprocess`, `forward`, `grid` and,
    where public checkpoints name or shape their weights otherwise, `from_public` and `to_public`."""

    card: ClassVar[ExpertCard]
    preprocessing: ClassVar[str]  # a version of the pixels' path; part of the fingerprint

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__()
        self.arch = dict(arch)

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """(H, W) of the features."""

    @property
    def channels(self) -> int:
        """C of the features."""
        return self.arch["channels"]

    @abstractmethod
    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """Images to the float32 tensors that `forward` takes, batched on the first axis."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Preprocessed tensors to features with tokens (B, H*W, C) in the module's dtype."""

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arch of weights in the published MoVA's names, as far as their shapes determine it; else the card's.

        Only the experts of published checkpoints need it.
        """
        return dict(cls.card.full)

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Public checkpoint names and shapes to this module's. Names already ours pass through unchanged."""
        return dict(state_dict)

    @classmethod
    def to_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """This module's state dict to the published MoVA's names and shapes: the inverse of `from_public` on those."""
        return dict(state_dict)

    def describe(self, dtype: torch.dtype | None = None, compat: PreprocessingMode = "fixed") -> dict[str, Any]:
        """All that decides a stored feature's value: expert, arch, weights (xxh3 of every tensor), pixels, dtype."""
        weights = xxhash.xxh3_128()
        # Published names, because those of this module may follow the installed libraries'.
        for name, tensor in sorted(self.to_public(self.state_dict(), self.arch).items()):
            weights.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stored = dtype or next(self.parameters()).dtype
        return {
            "expert": self.card.name,
            "arch": {key: list(it) if isinstance(it, tuple) else it for key, it in sorted(self.arch.items())},
            "weights": weights.hexdigest(),
            "preprocessing": f"{self.preprocessing}/{compat}",
            "dtype": str(stored).removeprefix("torch."),
            "grid": list(self.grid),
            "channels": self.channels,
        }


def fingerprint(description: Mapping[str, Any]) -> str:
    """16 hex digits of what `VisionExpert.describe` tells: new weights never read old features."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
