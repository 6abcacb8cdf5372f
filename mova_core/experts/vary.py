"""Vary's vocabulary network: dense text and documents; expert B.

Wei et al. 2023, "Vary: Scaling up the Vision Vocabulary for Large Vision-Language Models" (arXiv 2312.06109): SAM's
ViT-B and a convolution that halves the grid and doubles the channels. Vary's second such convolution (net_3) is left out,
as in MoVA.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mova_core.experts.base import ExpertCard, Features
from mova_core.experts.registry import register
from mova_core.experts.window_vit import WindowViT

# Vary-base and Vary-toy hold a CLIP under `vision_tower` and this network under `vision_tower_high`; Vary-tiny holds only
# this network, under `vision_tower`. All other tensors are the language model's.
TOWERS = ("vision_tower_high.", "vision_tower.")
LANGUAGE_MODEL = ("model.", "transformer.", "lm_head.")


@register
class Vary(WindowViT):
    """1024 px -> 32x32 tokens of 512 channels."""

    last_layer = "net_2.weight"
    card = ExpertCard(
        name="vary",
        title="Vary-base",
        description="This model can handle images with text accurately and efficiently but fails to process natural "
        "images.",
        weights="Haoran-megvii/Vary-toy",  # same network; Vary-base's own weights are public only within MoVA's
        full=dict(
            width=768,
            depth=12,
            heads=12,
            mlp_hidden=3072,
            patch_size=16,
            image_size=1024,
            window_size=14,
            global_blocks=(2, 5, 8, 11),
            channels=512,
        ),
        mini=dict(
            width=64,
            depth=2,
            heads=2,
            mlp_hidden=256,
            patch_size=16,
            image_size=128,
            window_size=4,
            global_blocks=(1,),
            channels=64,
        ),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch, neck_channels=arch["channels"] // 2)
        self.net_2 = nn.Conv2d(arch["channels"] // 2, arch["channels"], kernel_size=3, stride=2, padding=1, bias=False)

    @property
    def grid(self) -> tuple[int, int]:
        side = (self.side + 1) // 2
        return side, side

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`pixel_values` (B, 3, image_size, image_size) -> tokens (B, H*W, C) on half the patch grid."""
        features_BCHW = self.net_2(self.encode(batch["pixel_values"]))
        return Features(features_BCHW.flatten(2).transpose(1, 2), self.grid)

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From Vary's pytorch_model.bin (the whole language model or its tower), or a published MoVA tower."""
        tower = next((tower for tower in TOWERS if any(tower in name for name in state_dict)), "")
        ours = {}
        for name, tensor in state_dict.items():
            if tower and tower not in name and name.startswith(LANGUAGE_MODEL):
                continue
            name = name.rpartition(tower)[2] if tower else name
            if name != "net_3.weight":
                ours[name] = tensor
        return ours
