"""Pix2Struct-large's encoder (Lee et al. 2022, arXiv 2210.03347): text in images; expert D. DePlot has the same network.

The input is flattened patches, each with its row and column, of an image standardised by its own mean and deviation.

Legend: B images, N patches, D width, P pixels along a patch, h x w pixels.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mova_core.experts.base import ExpertCard, Features, PreprocessingMode, VisionExpert
from mova_core.experts.registry import register
from mova_core.experts.weight_shapes import WeightShapes
from mova_core.images import (
    CLIP_MEAN,
    MAX_PIXELS,
    DecodedImage,
    ImageError,
    ImageSource,
    load_image,
    mean_colour,
    pad_to_square,
)

COLOUR = mean_colour(CLIP_MEAN)
TABLES = ("embeddings.row_embedder.weight", "embeddings.column_embedder.weight")


@register
class Pix2Struct(VisionExpert):
    """720 px -> 45x45 tokens of 1536 channels, after the final norm.

    `pos_grid` is the length of the tables of row and of column embeddings; entries beyond the grid are not used.
    """

    preprocessing = "square-standardised-patches-1"
    card = ExpertCard(
        name="pix2struct",
        title="Pix2Struct-large",
        description="This model shows remarkable skill in text recognition, attaining top-tier text analysis outcomes "
        "across diverse areas",
        weights="google/pix2struct-large",
        full=dict(
            width=1536, depth=18, heads=24, mlp_hidden=3968, patch_size=16, image_size=720, pos_grid=4096, channels=1536
        ),
        mini=dict(width=96, depth=2, heads=2, mlp_hidden=256, patch_size=16, image_size=144, pos_grid=64, channels=96),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch)
        from transformers import Pix2StructVisionConfig, Pix2StructVisionModel  # takes seconds to import

        network = Pix2StructVisionModel(
            Pix2StructVisionConfig(
                hidden_size=arch["width"],
                d_ff=arch["mlp_hidden"],
                d_kv=arch["width"] // arch["heads"],
                num_hidden_layers=arch["depth"],
                num_attention_heads=arch["heads"],
                patch_embed_hidden_size=3 * arch["patch_size"] ** 2,
                seq_len=_positions(arch),
            )
        )
        self.embeddings, self.encoder, self.layernorm = network.embeddings, network.encoder, network.layernorm

    @property
    def grid(self) -> tuple[int, int]:
        side = self.arch["image_size"] // self.arch["patch_size"]
        return side, side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """`flattened_patches` (B, H*W, 2 + 3*P*P) float32: row and column, counted from 1, then the patch pixel by pixel.

        With compat "published", images of some sizes have 44 x 44 patches, as in the published code, and zero rows fill
        up the rest.

        Raises:
            ImageError: an image cannot be used; with "published" also one of a size that the published code refuses.
        """
        side, patch = self.grid[0], self.arch["patch_size"]
        flatten = square_patches if compat == "fixed" else _published_square_patches
        patches = torch.empty(len(images), side * side, 2 + 3 * patch * patch)
        for image, out in zip(images, patches, strict=True):
            if isinstance(image, DecodedImage):
                key = ("patches", side, patch, compat)
                out.copy_(image.cached(key, partial(flatten, image.decode(compat), side, patch)))
            else:
                flatten(load_image(image, compat), side, patch, out)
        return {"flattened_patches": patches}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`flattened_patches` (B, N, 2 + 3*P*P) -> tokens (B, N, C). Attention ignores patches of row 0: they are padding.

        The grid is (1, N) where N is not H*W.
        """
        patches = batch["flattened_patches"]
        real_BN = patches[..., 0] > 0
        mask_B11N = None if bool(real_BN.all()) else real_BN[:, None, None, :]
        embeddings = self.embeddings
        x = embeddings.patch_projection(patches[..., 2:].to(embeddings.patch_projection.weight.dtype))
        x = x + embeddings.row_embedder(patches[..., 0].long()) + embeddings.column_embedder(patches[..., 1].long())
        for layer in self.encoder.layer:
            x, _ = layer(x, mask_B11N)
        height, width = self.grid
        return Features(self.layernorm(x), self.grid if x.shape[1] == height * width else (1, x.shape[1]))

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = WeightShapes(state_dict)
        return shapes.arch(
            cls.card,
            width=lambda _: shapes.size("embeddings.patch_projection.weight"),
            depth=lambda _: shapes.depth("encoder.layer"),
            mlp_hidden=lambda _: shapes.size("encoder.layer.0.mlp.wi_0.weight"),
            patch_size=lambda _: math.isqrt(shapes.size("embeddings.patch_projection.weight", 1) // 3),
            pos_grid=lambda _: shapes.size("embeddings.row_embedder.weight"),
        )

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From Pix2StructForConditionalGeneration (its encoder), Pix2StructVisionModel or a published MoVA."""
        state = dict(state_dict)
        if any(name.startswith("encoder.embeddings.") for name in state):
            encoder = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")}
            state = {name.removeprefix("encoder."): tensor for name, tensor in encoder.items()}
        for name in TABLES:  # any length that covers the grid is accepted
            if name in state and len(state[name]) > arch["image_size"] // arch["patch_size"]:
                table_ND, missing = state[name][: _positions(arch)], _positions(arch) - len(state[name])
                state[name] = F.pad(table_ND, (0, 0, 0, missing)) if missing > 0 else table_ND
        return state


def _positions(arch: Mapping[str, Any]) -> int:
    """Length of the tables of row and column embeddings. Rows and columns are counted from 1, so entry 0 is padding's."""
    return max(arch["pos_grid"], arch["image_size"] // arch["patch_size"] + 1)


def square_patches(image: Image.Image, side: int, patch: int, out: Tensor | None = None) -> Tensor:
    """Cuts an RGB image, padded to a square with CLIP's mean colour, into side x side patches.

    The result equals `published_patches` of the padded image to about 1e-6, without building the padded image: the
    histogram gives mean and deviation, and only the narrow result of the resize along the longer side is padded.

    Args:
        side: patches along a side.
        patch: pixels along a side of a patch.
        out: where to write the result.

    Returns:
        (side*side, 2 + 3*patch*patch) float32; this is `out` where given.
    """
    width, height = image.size
    longer, shorter, size = max(width, height), min(width, height), side * patch
    mean, deviation = _padded_statistics(image, longer)
    # Resize along the longer side as the width: torch 2.15 resizes an image one pixel wide wrongly along its height.
    lying = image.transpose(Image.Transpose.TRANSPOSE) if height > width else image
    pixels = np.empty((3, shorter, longer), dtype=np.float32)
    for channel in range(3):
        values = np.asarray(lying.getchannel(channel))
        np.subtract(values, np.float32(mean), out=pixels[channel], dtype=np.float32)
    padded, offset = torch.empty(3, longer, size), (longer - shorter) // 2
    colour = (torch.tensor(COLOUR) - mean).float().view(3, 1, 1)
    padded[:, :offset], padded[:, offset + shorter :] = colour, colour
    padded[:, offset : offset + shorter] = _resize(torch.from_numpy(pixels), (shorter, size))
    square = _resize(padded, (size, size)).div_(deviation)
    return _flatten(square.transpose(1, 2) if height > width else square, patch, out)


def published_patches(array: np.ndarray, max_patches: int, patch: int) -> Tensor:
    """Cuts an image into patches as the published processor does: as many as fit at its proportions, then zero rows.

    An array whose first axis has 1 or 3 entries is taken as channels-first, a defect of the published code.

    Args:
        array: (h, w, 3) uint8.
        max_patches: rows of the result.
        patch: pixels along a side of a patch.

    Returns:
        (max_patches, 2 + channels*patch*patch) float32.
    """
    values = array.astype(np.float32)
    values -= np.float32(_float32_sum(values) / values.size)
    deviation = np.sqrt(np.float32(_float32_sum(values * values) / values.size))
    values /= np.float32(max(deviation, 1.0 / math.sqrt(values.size)))
    pixels_Chw = torch.from_numpy(values if array.shape[0] in (1, 3) else values.transpose(2, 0, 1))
    _, height, width = pixels_Chw.shape
    rows, columns = published_grid(height, width, max_patches, patch)
    patches = _flatten(_resize(pixels_Chw, (rows * patch, columns * patch)), patch)
    return F.pad(patches, (0, 0, 0, max_patches - len(patches)))


def published_grid(height: int, width: int, max_patches: int, patch: int) -> tuple[int, int]:
    """(rows, columns) of patches into which the published processor cuts an image of height x width pixels."""
    scale = math.sqrt(max_patches * (patch / height) * (patch / width))
    rows, columns = (math.floor(scale * length / patch) for length in (height, width))
    return max(min(rows, max_patches), 1), max(min(columns, max_patches), 1)


def _published_square_patches(image: Image.Image, side: int, patch: int, out: Tensor | None = None) -> Tensor:
    if max(image.size) == 1 or max(image.size) ** 2 > MAX_PIXELS:
        raise ImageError(f"PIL image {image.size}: the published path cannot read this size; the default one can")
    patches = published_patches(np.asarray(pad_to_square(image, COLOUR)), side * side, patch)
    return patches if out is None else out.copy_(patches)


def _float32_sum(values: np.ndarray) -> float:
    """The sum as numpy 1.26 rounds it, pairwise in runs of 8192; numpy 2 differs in the last bit."""
    flat = values.reshape(-1)
    whole = flat[: flat.size // 8192 * 8192].reshape(-1, 8192).sum(axis=1)
    return float(np.cumsum(np.append(whole, flat[whole.size * 8192 :].sum()), dtype=np.float32)[-1])


def _padded_statistics(image: Image.Image, longer: int) -> tuple[float, float]:
    """Mean and standard deviation of all values of the padded image; the deviation is at least 1/sqrt(number of values)."""
    counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    counts[range(3), COLOUR] += longer * longer - image.width * image.height
    values, counts = np.arange(256), counts.sum(axis=0)
    number = 3 * longer * longer
    mean = float(values @ counts) / number
    variance = float((values - mean) ** 2 @ counts) / number
    return mean, math.sqrt(max(variance, 1.0 / number))


def _resize(pixels_Chw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels_Chw[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _flatten(pixels_Chw: Tensor, patch: int, out: Tensor | None = None) -> Tensor:
    """(C, h, w) -> (h/P * w/P, 2 + P*P*C): row and column, from 1, then the patch row by row, channels innermost."""
    channels, height, width = pixels_Chw.shape
    rows, columns = height // patch, width // patch
    if out is None:
        out = torch.empty(rows * columns, 2 + patch * patch * channels)
    grid = out.view(rows, columns, -1)
    grid[..., 0] = torch.arange(1, rows + 1)[:, None]
    grid[..., 1] = torch.arange(1, columns + 1)
    # Channels-last first, so that each row of a patch is one contiguous run to copy.
    pixels_hwC = pixels_Chw.permute(1, 2, 0).contiguous()
    patches = pixels_hwC.view(rows, patch, columns, patch * channels).transpose(1, 2)
    grid[..., 2:].unflatten(-1, (patch, patch * channels)).copy_(patches)
    return out
