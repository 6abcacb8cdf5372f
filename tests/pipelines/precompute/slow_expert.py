"""An expert that takes 160 ms per picture and cannot prepare one of 13 pixels' width."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from mova_core.experts import Features, expert_class, register
from mova_core.images import ImageSource, PreprocessingMode, load_image

SECONDS = 0.16
BiomedClip = expert_class("biomedclip")


@register
class Slow(BiomedClip):  # type: ignore[valid-type, misc]
    card = dataclasses.replace(BiomedClip.card, name="slow")

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        if any(load_image(image).width == 13 for image in images):
            raise ValueError("13 is no width")
        return super().preprocess(images, compat)

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        time.sleep(SECONDS * len(next(iter(batch.values()))))
        return super().forward(batch)
