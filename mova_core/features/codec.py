"""Encodes tokens to bytes and decodes them: exact for float32, bfloat16 and float16; int8 and float8 with a scale per channel.

Shapes: N = H*W tokens, C channels. A row is the bytes of one feature in a shard: the scales (C,) float32 if the codec has
scales, then the tokens (N, C). The scales come first so that both parts are aligned.
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
    """The layout of tokens of one stored dtype in a row."""

    dtype: str  # torch's name of the dtype
    container: str  # safetensors' name of the dtype
    itemsize: int  # bytes of one value
    peak: float | None = None  # stored value of the largest token of a channel; None: values are stored without scale

    def tensors(self, key: str, grid: tuple[int, int], channels: int) -> dict[str, tuple[str, list[int], int]]:
        """The safetensors entries of one row, in file order: name -> (dtype, shape, bytes)."""
        shape = [*grid, channels]
        tokens = {key: (self.container, shape, prod(shape) * self.itemsize)}
        return tokens if self.peak is None else {f"{key}.scale": ("F32", [channels], 4 * channels), **tokens}

    def encode(self, tokens: Tensor) -> tuple[Any, float]:
        """Encodes tokens (N, C) of any float dtype on any device.

        Returns:
            The row (1-D numpy uint8), and the relative L2 error of the stored values.

        Raises:
            ValueError: the stored dtype cannot hold a value.
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
            scale = torch.where(scale > 0, scale, 1.0)  # a channel of zeros has no scale
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
        """Decodes a row (1-D uint8, 4-byte aligned) to tokens (N, C).

        The result is a view of the row in the stored dtype; a new float32 tensor if the codec has scales.
        """
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
    """xxh3-64 of the bytes of a row. It takes 12 GB/s per core, so every read is checked."""
    return xxhash.xxh3_64_intdigest(row)


def named_by(content: Any) -> str:
    """A file name derived from the content, so that the name checks the content, and a retry writes no second file."""
    return xxhash.xxh3_128_hexdigest(content)


def as_stored(features: Features, dtype: str) -> Features:
    """Features with the values they would have after they were stored in a dtype and read back.

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
