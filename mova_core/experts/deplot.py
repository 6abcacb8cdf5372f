"""DePlot (Liu et al. 2022, arXiv 2212.10505): plots and charts; expert E. Pix2Struct-base trained on charts."""

from mova_core.experts.base import ExpertCard
from mova_core.experts.pix2struct import Pix2Struct
from mova_core.experts.registry import register


@register
class Deplot(Pix2Struct):
    """720 px -> 45x45 tokens of 768 channels, after the final norm. Network, preprocessing and names are Pix2Struct's."""

    card = ExpertCard(
        name="deplot",
        title="DePlot",
        description="This model is a specialized model designed to achieve state-of-the-art plot and chart "
        "understanding performance.",
        weights="google/deplot",
        full=dict(
            width=768, depth=12, heads=12, mlp_hidden=2048, patch_size=16, image_size=720, pos_grid=4096, channels=768
        ),
        mini=dict(width=64, depth=2, heads=2, mlp_hidden=160, patch_size=16, image_size=144, pos_grid=64, channels=64),
    )
