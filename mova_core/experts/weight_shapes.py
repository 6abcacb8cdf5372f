"""Reads an expert's arch off the shapes of its weights."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import isqrt
from typing import Any

from torch import Tensor

from mova_core.experts.base import ExpertCard


class WeightShapes:
    """Shapes of a state dict, of which some tensors may be missing."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def size(self, tensor: str, axis: int = 0) -> int:
        """One side of a tensor. KeyError or IndexError where the tensor is missing or has no such axis."""
        return self.state[tensor].shape[axis]

    def side(self, tensor: str, axis: int = 0, others: int = 1) -> int:
        """Side of the square of positions along `axis`, of which `others` positions (the class token) are not part."""
        return isqrt(self.size(tensor, axis) - others)

    def blocks(self, prefix: str) -> list[int]:
        """Numbers of the blocks "prefix.0.", "prefix.1.", ... in ascending order."""
        matches = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in self.state)
        return sorted({int(match[1]) for match in matches if match})

    def depth(self, prefix: str) -> int:
        """How many blocks there are. IndexError where there is none."""
        return self.blocks(prefix)[-1] + 1

    def arch(self, card: ExpertCard, **words: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The published arch with every word that the shapes determine.

        A word whose tensor is missing keeps its published value: strict loading names that tensor later. Unless `words`
        says otherwise, a network has one head per 64 channels and features as wide as itself.

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
