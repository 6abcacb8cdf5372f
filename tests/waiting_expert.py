"""An expert that computes next to nothing and waits as long as it is told to: what is left is the cost of everything else.

Its features are the picture's own pixels, element by element times a weight, so their bits depend on nothing but the
picture: not on the batch it came in, the thread or the machine. Give it to a command with `--import waiting_expert`.

The environment of a node says how long it waits there, WAITING_MS (milliseconds per picture, default 0; divided by the
node's label `speed`, default 1), and where it tells each batch, WAITING_LOG: a file that gets a line with the time
(seconds), the process and the number of pictures. A process's first batch is the server's warm-up.
"""

import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import ray
import torch
from torch import Tensor, nn

from mova_core.experts import ExpertCard, Features, VisionExpert, register
from mova_core.images import CLIP_MEAN, CLIP_STD, ImageSource, PreprocessingMode, square_pixels

ARCH = {"image_size": 16, "patch_size": 8, "channels": 192}


@register
class Waiting(VisionExpert):
    preprocessing = "square-waiting-1"
    card = ExpertCard(
        name="waiting",
        title="Waiting",
        description="This model tells the colour of every pixel, in its own time.",
        weights="",
        full=ARCH,
        mini=ARCH,
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch)
        self.scale = nn.Parameter(torch.ones(self.channels))

    @property
    def grid(self) -> tuple[int, int]:
        side = self.arch["image_size"] // self.arch["patch_size"]
        return side, side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        return {"pixel_values": square_pixels(images, self.arch["image_size"], CLIP_MEAN, CLIP_STD, compat)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        pixels_B3SS = batch["pixel_values"]
        time.sleep(len(pixels_B3SS) * _wait_seconds())
        if log := os.environ.get("WAITING_LOG"):
            with open(log, "a") as file:  # one write of a short line: whole, whoever else writes there
                file.write(f"{time.time():.6f} {os.getpid()} {len(pixels_B3SS)}\n")
        tokens_BCN = nn.functional.unfold(pixels_B3SS, self.arch["patch_size"], stride=self.arch["patch_size"])
        return Features(tokens_BCN.transpose(1, 2) * self.scale, self.grid)


@cache
def _wait_seconds() -> float:
    """Per picture, on the node that this process runs on."""
    speed = ray.get_runtime_context().get_node_labels().get("speed", "1") if ray.is_initialized() else "1"
    return float(os.environ.get("WAITING_MS", "0")) / 1000 / float(str(speed))
