"""An expert whose servers a test controls through files, because they run in processes of Ray.

In the folder `controlled` of $MOVA_CACHE each server writes a file named by its process id, and a forward pass waits as
long as the file <process id>.hold exists.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mova_core.experts import Features, expert_class, register

BiomedCLIP = expert_class("biomedclip")


def folder() -> Path:
    return Path(os.environ["MOVA_CACHE"]) / "controlled"


@register
class Controlled(BiomedCLIP):  # type: ignore[misc, valid-type]
    card = dataclasses.replace(BiomedCLIP.card, name="controlled")

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / str(os.getpid())).touch()
        while (folder() / f"{os.getpid()}.hold").exists():
            time.sleep(0.02)
        return super().forward(batch)  # type: ignore[no-any-return]
