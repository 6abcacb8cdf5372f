"""BiomedCLIP's image encoder (timm's ViT-B/16): biomedical images; expert F.

Zhang et al. 2023, "BiomedCLIP" (arXiv 2303.00915). MoVA gives this network the base encoder's image, in CLIP's
normalisation, shrunk to 224 pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mova_core.experts.base import ExpertCard, Features, VisionExpert
from mova_core.experts.registry import register
from mova_core.experts.weight_shapes import WeightShapes
from mova_core.images import ImageSource, PreprocessingMode, clip_pixels

OTHER_PARTS = ("text.", "head.", "logit_scale", "logit_bias")


@register
class BiomedCLIP(VisionExpert):
    """224 px -> 14x14 tokens of 768 channels, after the final norm and without the class token.

    `picture_size` in its arch is the side in pixels to which `preprocess` scales images: the base encoder's size.
    """

    preprocessing = "square-clip-bicubic-bilinear-1"
    card = ExpertCard(
        name="biomedclip",
        title="BiomedCLIP ViT-B/16",
        description="This model is a foundation model designed for biomedical vision-language processing.",
        weights="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        full=dict(
            width=768,
            depth=12,
            heads=12,
            mlp_hidden=3072,
            patch_size=16,
            image_size=224,
            picture_size=672,
            channels=768,
        ),
        mini=dict(
            width=64,
            depth=2,
            heads=2,
            mlp_hidden=256,
            patch_size=16,
            image_size=64,
            picture_size=168,
            channels=64,
        ),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch)
        from timm.models.vision_transformer import VisionTransformer  # takes seconds to import, so only when built

        self.trunk = VisionTransformer(
            img_size=arch["image_size"],
            patch_size=arch["patch_size"],
            embed_dim=arch["width"],
            depth=arch["depth"],
            num_heads=arch["heads"],
            mlp_ratio=arch["mlp_hidden"] / arch["width"],
            num_classes=0,
            global_pool="",
        )

    @property
    def grid(self) -> tuple[int, int]:
        side = self.arch["image_size"] // self.arch["patch_size"]
        return side, side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """`pixel_values` (B, 3, image_size, image_size) float32: CLIP's pixels, shrunk as MoVA's tower shrinks them."""
        return {"pixel_values": self._shrink(clip_pixels(images, self.arch["picture_size"], compat))}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`pixel_values` (B, 3, h, w) -> tokens (B, H*W, C). Images of any size are resized to image_size first."""
        pixels = self._shrink(batch["pixel_values"]).to(self.trunk.patch_embed.proj.weight.dtype)
        return Features(self.trunk.forward_features(pixels)[:, 1:], self.grid)

    def _shrink(self, pixels_B3hw: Tensor) -> Tensor:
        # Bilinear without antialiasing, as published. For an odd ratio such as 672 -> 224 this is exactly the middle pixel
        # of each group, and a strided copy is faster.
        size = (self.arch["image_size"], self.arch["image_size"])
        if pixels_B3hw.shape[-2:] == size:
            return pixels_B3hw  # `preprocess` has shrunk them
        times, rest = divmod(pixels_B3hw.shape[-1], self.arch["image_size"])
        if not rest and times % 2 and pixels_B3hw.shape[-2] == pixels_B3hw.shape[-1]:
            return pixels_B3hw[..., times // 2 :: times, times // 2 :: times].float().contiguous()
        return F.interpolate(pixels_B3hw.float(), size=size, mode="bilinear", align_corners=False)

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = WeightShapes(state_dict)
        return shapes.arch(
            cls.card,
            width=lambda _: shapes.size("trunk.cls_token", 2),
            depth=lambda _: shapes.depth("trunk.blocks"),
            mlp_hidden=lambda _: shapes.size("trunk.blocks.0.mlp.fc1.weight"),
            patch_size=lambda _: shapes.size("trunk.patch_embed.proj.weight", 2),
            image_size=lambda arch: shapes.side("trunk.pos_embed", 1) * arch["patch_size"],
        )

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From open_clip's checkpoint (visual.trunk.*) or a published MoVA tower; text and projection are left out."""
        names = {name.removeprefix("visual."): tensor for name, tensor in state_dict.items()}
        return {name: tensor for name, tensor in names.items() if not name.startswith(OTHER_PARTS)}
