"""An expert that takes 20 ms per picture and cannot prepare one of 13 pixels' width."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

from torch import Tensor
from waiting_expert import Waiting

from mova_core.experts import Features, register
from mova_core.images import Compat, ImageSource, load_image

MILLISECONDS = 20


@register
class Slow(Waiting):
    card = dataclasses.replace(Waiting.card, name="slow")

    def preprocess(self, images: Sequence[ImageSource], compat: Compat = "fixed") -> dict[str, Tensor]:
        if any(load_image(image).width == 13 for image in images):
            raise ValueError("13 is no width")
        return super().preprocess(images, compat)

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        time.sleep(MILLISECONDS / 1000 * len(batch["pixel_values"]))
        return super().forward(batch)
