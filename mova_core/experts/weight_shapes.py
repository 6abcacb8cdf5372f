"""Weights of other shapes: reads an expert's arch off them, and resizes tables of positions."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mova_core.experts.base import ExpertCard


class WeightShapes:
    """Reads sizes from the shapes of a state dict, in which tensors may be missing."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def size(self, tensor: str, axis: int = 0) -> int:
        """The length of one axis of a tensor.

        Raises:
            KeyError, IndexError: the tensor is missing, or has no such axis.
        """
        return self.state[tensor].shape[axis]

    def side(self, tensor: str, axis: int = 0, others: int = 1) -> int:
        """Side of the square of positions along `axis`, of which `others` positions (the class token) are not part."""
        return isqrt(self.size(tensor, axis) - others)

    def blocks(self, prefix: str) -> list[int]:
        """Numbers of the blocks "prefix.0.", "prefix.1.", ... in ascending order."""
        matches = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in self.state)
        return sorted({int(match[1]) for match in matches if match})

    def depth(self, prefix: str) -> int:
        """The number of blocks.

        Raises:
            IndexError: there is none.
        """
        return self.blocks(prefix)[-1] + 1

    def arch(self, card: ExpertCard, **words: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The published arch, with every word replaced that the shapes determine.

        A word whose tensor is missing keeps its published value; strict loading reports that tensor later. Without
        functions for them in `words`, `heads` is one per 64 channels and `channels` is the network's width.

        Args:
            words: arch word -> function of the arch read so far, called in this order.
        """
        arch = dict(card.full)
        for word, read in words.items():
            with suppress(KeyError, IndexError):
                arch[word] = read(arch)
        if "heads" not in words:
            arch["heads"] = max(1, arch["width"] // 64)
        if "channels" not in words:
            arch["channels"] = arch["width"]
        return arch


def resize_positions(
    table_1ND: Tensor, size: tuple[int, int], others: int = 0, scale: tuple[float, float] | None = None
) -> Tensor:
    """Resizes a square table of position embeddings by bicubic interpolation in float32.

    Args:
        table_1ND: (1, others + side*side, D).
        size: (H, W) of the result.
        others: rows at the beginning that stay as they are, such as the class token's.
        scale: factors for the interpolation, where they are not exactly the ratios of the sizes.

    Returns:
        (1, others + H*W, D) in the table's dtype. A table of this size already, or one that is not a square, is returned
        unchanged: strict loading then reports its shape.
    """
    count = table_1ND.shape[1] - others if table_1ND.ndim == 3 else 0
    side = isqrt(max(count, 0))
    if size == (side, side) or count <= 0 or side**2 != count:
        return table_1ND
    map_1DHW = table_1ND[:, others:].transpose(1, 2).unflatten(2, (side, side)).float()
    sizes = {"size": size} if scale is None else {"scale_factor": scale}
    map_1DHW = F.interpolate(map_1DHW, mode="bicubic", align_corners=False, **sizes)
    return torch.cat([table_1ND[:, :others], map_1DHW.flatten(2).transpose(1, 2).to(table_1ND.dtype)], dim=1)
