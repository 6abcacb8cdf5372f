"""DINOv2-giant (Oquab et al. 2023, arXiv 2304.07193): spatial and semantic features of natural images; expert A.

Legend: B images, N patches, D width, H x W patches.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mova_core.experts.base import ExpertCard, Features, PreprocessingMode, VisionExpert
from mova_core.experts.registry import register
from mova_core.experts.weight_shapes import WeightShapes, resize_positions
from mova_core.images import ImageSource, square_pixels

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PREFIX = "dinov2."
OTHER_PARTS = ("classifier.",)
RENAMED = {  # published name -> name in newer transformers
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_out": "mlp.down_proj",
}
POSITIONS = "embeddings.position_embeddings"
FUSED, GATE, UP = "mlp.weights_in", "mlp.gate_proj", "mlp.up_proj"  # published: gate over up in one matrix


@register
class Dinov2(VisionExpert):
    """518 px -> 37x37 tokens of 1536 channels: the last layer but one, without final norm and class token.

    Words of its arch beside the common ones: `picture_size` is the side in pixels to which `preprocess` scales images
    (the base encoder's size; `forward` shrinks them to `image_size`). With `mlp_hidden` of four times the width, blocks
    have the plain GELU MLP in place of SwiGLU. `pos_grid` is the side of the trained position table; without this word,
    loading resizes the table to the image's grid.
    """

    preprocessing = "square-dinov2-bicubic-bilinear-1"
    card = ExpertCard(
        name="dinov2",
        title="DINOv2-giant",
        description="This model can effectively extract the accurate spatial and semantic information from "
        "natural images.",
        weights="facebook/dinov2-giant",
        full=dict(width=1536, depth=40, heads=24, patch_size=14, image_size=518, picture_size=672, channels=1536),
        mini=dict(width=96, depth=3, heads=3, patch_size=14, image_size=126, picture_size=168, channels=96),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch)
        swiglu_hidden = (arch["width"] * 8 // 3 + 7) // 8 * 8
        mlp_hidden = arch.get("mlp_hidden", swiglu_hidden)
        gelu = mlp_hidden == 4 * arch["width"]
        ratio = 4 if gelu else round(mlp_hidden * 3 / 2 / arch["width"])  # transformers accepts only whole ratios
        if not gelu and mlp_hidden != (arch["width"] * ratio * 2 // 3 + 7) // 8 * 8:
            choice = f"{swiglu_hidden} (SwiGLU) or {4 * arch['width']} (GELU)"
            raise ValueError(f"dinov2 of width {arch['width']} needs mlp_hidden {choice}, not {mlp_hidden}")
        network = _network(
            hidden_size=arch["width"],
            num_hidden_layers=arch["depth"],
            num_attention_heads=arch["heads"],
            patch_size=arch["patch_size"],
            image_size=arch.get("pos_grid", self.grid[0]) * arch["patch_size"],
            use_swiglu_ffn=not gelu,
            mlp_ratio=ratio,
        )
        self.embeddings, self.encoder, self.layernorm = network.embeddings, network.encoder, network.layernorm

    @property
    def grid(self) -> tuple[int, int]:
        side = self.arch["image_size"] // self.arch["patch_size"]
        return side, side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """`pixel_values` (B, 3, picture_size, picture_size) float32: padded to a square, bicubic, ImageNet's norm."""
        return {"pixel_values": square_pixels(images, self.arch["picture_size"], MEAN, STD, compat)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`pixel_values` (B, 3, h, w) -> tokens (B, H*W, C). Images wider than image_size are shrunk to it first."""
        pixels, side = batch["pixel_values"], self.arch["image_size"]
        if pixels.shape[-1] > side:  # without antialiasing, as in the published code
            pixels = F.interpolate(pixels.float(), size=(side, side), mode="bilinear", align_corners=False)
        map_BDHW = self.embeddings.patch_embeddings.projection(pixels.to(self.embeddings.cls_token.dtype))
        patches_BND = map_BDHW.flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.cls_token.expand(len(pixels), -1, -1), patches_BND], dim=1)
        x = x + self.positions(*map_BDHW.shape[-2:])
        for layer in self.encoder.layer[:-1]:
            x = layer(x)
        return Features(x[:, 1:], tuple(map_BDHW.shape[-2:]))

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + H*W, D) of a map of height x width patches."""
        return _resize(self.embeddings.position_embeddings, height, width)

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = WeightShapes(state_dict)
        return shapes.arch(
            cls.card,
            width=lambda _: shapes.size("embeddings.cls_token", 2),
            depth=lambda _: shapes.depth("encoder.layer"),
            mlp_hidden=lambda _: shapes.size("encoder.layer.0.mlp.weights_out.weight", 1),
            patch_size=lambda _: shapes.size("embeddings.patch_embeddings.projection.weight", 2),
            image_size=lambda arch: shapes.side(POSITIONS, 1) * arch["patch_size"],
        )

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From Dinov2Model or Dinov2ForImageClassification of any transformers, or a published MoVA."""
        state = {
            name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items() if not name.startswith(OTHER_PARTS)
        }
        installed = _installed_names()
        for published, newer in RENAMED.items():
            old, new = (published, newer) if newer in installed else (newer, published)
            state = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in state.items()}
        if POSITIONS in state and "pos_grid" not in arch:
            side = arch["image_size"] // arch["patch_size"]
            state[POSITIONS] = _resize(state[POSITIONS], side, side)
        if GATE not in installed:
            return _fused(state)
        for name in [name for name in state if f".{FUSED}." in name]:
            gate, up = state.pop(name).chunk(2)
            state |= {name.replace(FUSED, GATE): gate, name.replace(FUSED, UP): up}
        return state

    @classmethod
    def to_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """To the published MoVA's names."""
        state = dict(state_dict)
        for published, newer in RENAMED.items():
            state = {name.replace(f".{newer}.", f".{published}."): tensor for name, tensor in state.items()}
        return _fused(state)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenates the gate and up matrices of every layer, as published checkpoints hold them; copies both."""
    for gate in [name for name in state if f".{GATE}." in name and name.replace(GATE, UP) in state]:
        state[gate.replace(GATE, FUSED)] = torch.cat([state.pop(gate), state.pop(gate.replace(GATE, UP))])
    return state


def _resize(table_1ND: Tensor, height: int, width: int) -> Tensor:
    """Resizes position embeddings, the class token's row kept, to a map of height x width patches.

    The published code passes the scale factor (H + 0.1)/side where newer libraries pass the size: results differ in the
    first decimal.
    """
    side = isqrt(table_1ND.shape[-2] - 1)
    scale = ((height + 0.1) / side, (width + 0.1) / side) if side else None
    return resize_positions(table_1ND, (height, width), others=1, scale=scale)


def _network(**config: Any) -> Any:
    from transformers import Dinov2Config, Dinov2Model  # takes seconds to import, so only when built

    return Dinov2Model(Dinov2Config(**config))


@lru_cache(maxsize=1)
def _installed_names() -> str:
    """Parameter names of one layer in the installed version of transformers."""
    with torch.device("meta"):  # only of this thread, unlike `init_empty_weights`
        network = _network(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, use_swiglu_ffn=True)
    return " ".join(network.state_dict())
