"""SAM's image encoder (ViT-H): segmentation; expert G.

Kirillov et al. 2023, "Segment Anything" (arXiv 2304.02643). MoVA gives this network the same
image as Vary, normalised as for CLIP.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mova_core.experts.base import ExpertCard
from mova_core.experts.registry import register
from mova_core.experts.window_vit import WindowViT

OTHER_PARTS = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "pixel_mean", "pixel_std")
FROM_TRANSFORMERS = (
    (r"^vision_encoder\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.layer_norm", r"blocks.\1.norm"),
    (r"^layers\.", "blocks."),
    (r"^neck\.conv1\.", "neck.0."),
    (r"^neck\.layer_norm1\.", "neck.1."),
    (r"^neck\.conv2\.", "neck.2."),
    (r"^neck\.layer_norm2\.", "neck.3."),
)


@register
class SAM(WindowViT):
    """1024 px -> 64x64 tokens of 256 channels."""

    card = ExpertCard(
        name="sam",
        title="SAM ViT-H",
        description="This model is a leading image segmentation framework and achieves strong zero-shot segmentation "
        "performance.",
        weights="facebook/sam-vit-huge",
        full=dict(
            width=1280,
            depth=32,
            heads=16,
            mlp_hidden=5120,
            patch_size=16,
            image_size=1024,
            window_size=14,
            global_blocks=(7, 15, 23, 31),
            channels=256,
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
            channels=32,
        ),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch, neck_channels=arch["channels"])

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From segment-anything's .pth, transformers' SamModel, or a published MoVA tower (which has this module's names)."""
        ours = {}
        for name, tensor in state_dict.items():
            if name.startswith(OTHER_PARTS):
                continue
            name = name.removeprefix("image_encoder.")
            for pattern, replacement in FROM_TRANSFORMERS:
                name = re.sub(pattern, replacement, name)
            ours[name] = tensor
        return ours
