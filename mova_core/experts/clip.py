"""CLIP ViT-L/14 (Radford et al. 2021, arXiv 2103.00020): MoVA's base encoder, at 672 instead of 336 pixels.

Legend: B images, N patches, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mova_core.experts.base import ExpertCard, Features, PreprocessingMode, VisionExpert
from mova_core.experts.registry import register
from mova_core.experts.weight_shapes import WeightShapes, resize_positions
from mova_core.images import ImageSource, clip_pixels

PREFIX = "vision_model."
POSITIONS = "embeddings.position_embedding.weight"
OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@register
class Clip(VisionExpert):
    """672 px -> 48x48 tokens of 1024 channels: the output of the last layer but one, without the class token.

    The last layer and the norm after it are never computed. They are buffers, not parameters, so that a checkpoint is
    loaded and saved whole while DDP finds no parameter without a gradient.
    """

    preprocessing = "square-clip-bicubic-1"
    card = ExpertCard(
        name="clip",
        title="CLIP ViT-L/14",
        description="This model can effectively understand the overall content of images and their relation to text.",
        weights="openai/clip-vit-large-patch14-336",
        full=dict(width=1024, depth=24, heads=16, mlp_hidden=4096, patch_size=14, image_size=672, channels=1024),
        mini=dict(width=128, depth=4, heads=2, mlp_hidden=256, patch_size=14, image_size=168, channels=128),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch)
        from transformers import CLIPVisionConfig, CLIPVisionModel  # takes seconds to import, so only when built

        network = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=arch["width"],
                intermediate_size=arch["mlp_hidden"],
                num_hidden_layers=arch["depth"],
                num_attention_heads=arch["heads"],
                image_size=arch["image_size"],
                patch_size=arch["patch_size"],
            )
        )
        self.embeddings = network.embeddings
        self.pre_layrnorm = network.pre_layrnorm
        self.encoder = network.encoder
        self.post_layernorm = network.post_layernorm
        del self.embeddings.position_ids  # a buffer outside the state dict would be lost on the meta device
        for unused in (self.encoder.layers[-1], self.post_layernorm):
            _keep_as_buffers(unused)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.arch["image_size"] // self.arch["patch_size"]
        return side, side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """`pixel_values` (B, 3, image_size, image_size) float32: padded to a square, bicubic, CLIP's normalisation."""
        return {"pixel_values": clip_pixels(images, self.arch["image_size"], compat)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`pixel_values` (B, 3, image_size, image_size) -> tokens (B, H*W, C).

        Raises:
            ValueError: images of another size.
        """
        pixels = batch["pixel_values"].to(self.embeddings.patch_embedding.weight.dtype)
        if pixels.shape[-2:] != (self.arch["image_size"],) * 2:
            raise ValueError(f"clip reads {self.arch['image_size']}-pixel squares, not {tuple(pixels.shape[-2:])}")
        patches_BND = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        class_B1D = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([class_B1D, patches_BND], dim=1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers[:-1]:
            x = layer(x, None)
        return Features(x[:, 1:], self.grid)

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = WeightShapes(state_dict)
        return shapes.arch(
            cls.card,
            width=lambda _: shapes.size("vision_model.embeddings.class_embedding"),
            depth=lambda _: shapes.depth("vision_model.encoder.layers"),
            mlp_hidden=lambda _: shapes.size("vision_model.encoder.layers.0.mlp.fc1.weight"),
            patch_size=lambda _: shapes.size("vision_model.embeddings.patch_embedding.weight", 2),
            image_size=lambda arch: shapes.side(PREFIX + POSITIONS) * arch["patch_size"],
        )

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From CLIPModel, CLIPVisionModel or a published MoVA; positions are resized to the arch's grid."""
        state = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in state_dict.items()
            if not name.startswith(OTHER_PARTS) and not name.endswith("position_ids")
        }
        if POSITIONS in state:
            side = arch["image_size"] // arch["patch_size"]
            state[POSITIONS] = resize_positions(state[POSITIONS][None], (side, side), others=1)[0]
        return state

    @classmethod
    def to_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """To the published MoVA's names."""
        return {PREFIX + name: tensor for name, tensor in state_dict.items()}


def _keep_as_buffers(module: nn.Module) -> None:
    """Replaces the parameters of a module and of its children by buffers of the same names."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, torch.zeros(parameter.shape))
