"""The interface of every vision expert: a card, a frozen network, its preprocessing, and features on its native grid.

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
    """The description of an expert that the pool has without building the network."""

    name: str
    title: str  # as people call it, e.g. "DINOv2-giant"
    description: str  # the line the router reads (paper Table 2); names no model
    weights: str  # the public default: a hub id
    full: Mapping[str, Any]  # arch of the published expert (paper Table 12)
    mini: Mapping[str, Any]  # the same class with small numbers


class VisionExpert(nn.Module, ABC):
    """A vision expert: images in, features on its native grid out.

    A subclass sets `card` and `preprocessing`, and implements `preprocess`, `forward` and `grid`. Where public
    checkpoints name or shape their weights differently, it also implements `from_public` and `to_public`.

    Args:
        arch: sizes of the network; the words are those of the card's `full` and `mini`.
    """

    card: ClassVar[ExpertCard]
    preprocessing: ClassVar[str]  # version of the preprocessing; part of the fingerprint

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__()
        self.arch = dict(arch)

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """(H, W) of the features: rows and columns of tokens."""

    @property
    def channels(self) -> int:
        """C, the width of one token."""
        return self.arch["channels"]

    @abstractmethod
    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """Turns images into the float32 tensors that `forward` takes, batched on the first axis.

        Args:
            compat: "fixed", or "published" for the pixels of the published code, its defects included.

        Raises:
            ImageError: an image cannot be read or used.
        """

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Computes features with tokens (B, H*W, C) in the module's dtype from what `preprocess` returned."""

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Reads the arch off the shapes of weights in the published MoVA's names; words left open keep the card's value.

        Only experts that published checkpoints contain need to implement this.
        """
        return dict(cls.card.full)

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Converts names and shapes of a public checkpoint to this module's; names of this module stay unchanged."""
        return dict(state_dict)

    @classmethod
    def to_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Converts this module's state dict to the published MoVA's names and shapes: the inverse of `from_public`."""
        return dict(state_dict)

    def describe(self, dtype: torch.dtype | None = None, compat: PreprocessingMode = "fixed") -> dict[str, Any]:
        """Everything that decides a stored feature's value: expert, arch, weights (xxh3 of every tensor), pixels, dtype.

        Args:
            dtype: of the stored features; default: that of the parameters.
            compat: as in `preprocess`.
        """
        weights = xxhash.xxh3_128()
        # Published names: this module's names may change with the installed transformers, fingerprints must not.
        for name, tensor in sorted(self.to_public(self.state_dict(), self.arch).items()):
            weights.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stored = dtype or next(self.parameters()).dtype
        return {
            "expert": self.card.name,
            "arch": {
                key: list(value) if isinstance(value, tuple) else value for key, value in sorted(self.arch.items())
            },
            "weights": weights.hexdigest(),
            "preprocessing": f"{self.preprocessing}/{compat}",
            "dtype": str(stored).removeprefix("torch."),
            "grid": list(self.grid),
            "channels": self.channels,
        }


def fingerprint(description: Mapping[str, Any]) -> str:
    """16 hex digits that identify what `VisionExpert.describe` returns, so that new weights never read old features."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
