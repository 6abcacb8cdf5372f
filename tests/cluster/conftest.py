"""Clusters and profiles by chance, from a seed: speeds and memories as they might be, of no real GPU."""

import random
from collections.abc import Sequence

import pytest

from cluster.nodes import GIB, NodeType
from mova_core.experts.cost import Measured, Profile

TFLOPS = {
    "dinov2": 3.48,
    "vary": 0.93,
    "codetr": 4.7,
    "pix2struct": 2.53,
    "deplot": 0.52,
    "biomedclip": 0.04,
    "sam": 5.64,
}
GPUS = {"H100": (400.0, 80), "A100": (180.0, 40), "L4": (50.0, 22), "T4": (25.0, 15)}  # TFLOP/s and GiB


class Chance(random.Random):
    """Draws what the tests need."""

    def profiles(self, gpus: Sequence[str] = tuple(GPUS), cpu: bool = True) -> list[Profile]:
        return [self._profile(name, kind) for name in TFLOPS for kind in (*gpus, *(("cpu X",) if cpu else ()))]

    def _profile(self, name: str, device: str) -> Profile:
        tflops, memory = GPUS.get(device, (0.4, 8))
        speed = tflops / TFLOPS[name] * self.uniform(0.3, 1.0)
        weights, each = self.uniform(0.3, 2.5), TFLOPS[name] * self.uniform(0.1, 0.3)  # GiB
        batches = [
            Measured(batch=b, images_per_second=speed * b / (b + 2), peak_bytes=int((weights + b * each) * GIB))
            for b in (2**power for power in range(7))
            if b == 1 or weights + b * each < memory - 1
        ]
        return Profile(expert=name, arch={}, dtype="bfloat16", device=device, threads=4, batches=batches)

    def cluster(self, gpu_kinds: Sequence[str] = tuple(GPUS), most: int = 3) -> list[NodeType]:
        """Some machines of each of some kinds of GPU, and some with none."""
        found = [
            NodeType(
                count=self.randint(1, most),
                cpus=self.choice([8, 16, 64]),
                memory=self.choice([32, 64, 256]) * GIB,
                accelerator=kind,
                gpus=self.choice([1, 2, 4, 8]),
                gpu_memory=GPUS[kind][1] * GIB,
            )
            for kind in self.sample(list(gpu_kinds), self.randint(0, len(gpu_kinds)))
        ]
        bare = NodeType(count=self.randint(1, most), cpus=self.choice([6, 16, 30]), memory=self.choice([24, 100]) * GIB)
        return [*found, bare]

    def mix(self, least: int = 1) -> dict[str, int]:
        """Features wanted of some experts."""
        return {name: self.randint(5, 100) * 1000 for name in self.sample(list(TFLOPS), self.randint(least, 7))}


@pytest.fixture(params=range(4))
def chance(request) -> Chance:
    return Chance(request.param)
