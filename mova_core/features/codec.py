"""Tokens to bytes and back: exact for float32, bfloat16 and float16; int8 and float8 keep one scale per channel.

Shapes: N = H*W tokens, C channels. A row is what one feature takes in a shard: the scales (C,) float32 if the codec has
them, then the tokens (N, C); the scales come first so that both stay aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mova_core.experts import Features


@dataclass(frozen=True)
class Codec:
    """How tokens of one stored dtype lie in a row."""

    dtype: str  # torch's name of it
    container: str  # safetensors' name of it
    itemsize: int
    peak: float | None = None  # the stored value of each channel's largest token; None stores values as they are

    def tensors(self, key: str, grid: tuple[int, int], channels: int) -> dict[str, tuple[str, list[int], int]]:
        """The safetensors entries of one row, in file order: name -> (dtype, shape, bytes)."""
        shape = [*grid, channels]
        tokens = {key: (self.container, shape, prod(shape) * self.itemsize)}
        return tokens if self.peak is None else {f"{key}.scale": ("F32", [channels], 4 * channels), **tokens}

    def encode(self, tokens: Tensor) -> tuple[Any, float]:
        """Tokens (N, C) of any float dtype on any device to a row (numpy uint8, 1-D) and the relative L2 loss it makes.

        Raises:
            ValueError: a value the stored dtype cannot hold.
        """
        import torch

        tokens = tokens.detach().cpu()
        if self.peak is None:
            stored = tokens.to(getattr(torch, self.dtype)).contiguous()
            row = stored.reshape(-1).view(torch.uint8)
            if stored.dtype is tokens.dtype:
                return row.numpy(), 0.0
            decoded = stored
        else:
            if not tokens.isfinite().all():
                raise ValueError(f"{self.dtype} has no NaN and no infinity: store float32 or bfloat16 instead")
            wide = tokens.float()
            scale = wide.abs().amax(0) / self.peak
            scale = torch.where(scale > 0, scale, 1.0)  # a channel of zeros
            scaled = wide / scale
            stored = (scaled.round() if self.dtype == "int8" else scaled).to(getattr(torch, self.dtype))
            row = torch.cat([scale.view(torch.uint8), stored.reshape(-1).view(torch.uint8)])
            decoded = stored.float() * scale
        finite = tokens.isfinite()
        if not decoded.isfinite()[finite].all():
            peak = tokens[finite].abs().max().item()
            raise ValueError(f"{self.dtype} cannot hold {peak:.3g}: store bfloat16 or float32 instead")
        exact = tokens[finite].float()
        norm = exact.norm().item()
        return row.numpy(), (decoded[finite].float() - exact).norm().item() / norm if norm else 0.0

    def decode(self, row: np.ndarray, channels: int) -> Tensor:
        """A row (uint8, 1-D, 4-byte aligned) to tokens (N, C): a view in the stored dtype; float32 if it has scales."""
        import torch

        dtype = getattr(torch, self.dtype)
        if self.peak is None:
            return torch.frombuffer(row, dtype=dtype).view(-1, channels)
        scales = torch.frombuffer(row, dtype=torch.float32, count=channels)
        return torch.frombuffer(row, dtype=dtype, offset=4 * channels).view(-1, channels).float() * scales


CODECS = {
    codec.dtype: codec
    for codec in (
        Codec("float32", "F32", 4),
        Codec("bfloat16", "BF16", 2),
        Codec("float16", "F16", 2),
        Codec("int8", "I8", 1, peak=127.0),
        Codec("float8_e4m3fn", "F8_E4M3", 1, peak=448.0),
    )
}


def checksum(row: Any) -> int:
    """xxh3-64 of a row's bytes: 12 GB/s a core, so every read is checked."""
    return xxhash.xxh3_64_intdigest(row)


def named_by(content: Any) -> str:
    """A file's name by its bytes: it checks itself, and a retry makes no second one."""
    return xxhash.xxh3_128_hexdigest(content)


def as_stored(features: Features, dtype: str) -> Features:
    """Features as reading them back would give them after they were stored in a dtype.

    Args:
        features: with tokens (H*W, C) of any float dtype on any device.
        dtype: name of the stored dtype, one of `CODECS`.
    """
    import torch

    codec = CODECS[dtype]
    if codec.peak is None and features.tokens.dtype is getattr(torch, dtype):
        return features
    content, _ = codec.encode(features.tokens)
    return features._replace(tokens=codec.decode(content, features.tokens.shape[1]))
