import os
import signal
import time

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from actors.expert_pool import ExpertPool, Servers
from mova_core.experts import load_expert
from mova_core.features import FeatureStore, LocalExperts, Tiered
from mova_core.images import ImageError, ImageRef

pytestmark = pytest.mark.ray


def test_pool_serves_what_the_experts_compute(ray_cluster, tmp_path):
    rng = np.random.default_rng(2)
    paths = [str(tmp_path / f"{index}.png") for index in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    images = [ImageRef(path=path) for path in paths]
    pool = ExpertPool(
        {
            "sam": Servers(num_cpus=0.5, batch_size=2, server={"size": "mini", "queue": 1}),  # so some must ask again
            "deplot": Servers(num_cpus=0.5, server={"size": "mini"}),
        }
    )
    wanted = [["sam"], ["sam", "deplot"], [], ["deplot"], ["sam"]]
    local = LocalExperts({name: load_expert(name, size="mini") for name in ("sam", "deplot")})

    def same(rows):
        for got, expected in zip(rows, local.fetch(images, wanted), strict=True):
            assert got.keys() == expected.keys()
            for name in got:
                torch.testing.assert_close(got[name].tokens, expected[name].tokens, atol=1e-5, rtol=0)

    try:
        same(pool.fetch(images, wanted))
        assert pool.fingerprints == local.fingerprints

        store = FeatureStore(tmp_path / "store", create=True)
        same(Tiered(store, pool).fetch(images, wanted))
        same(FeatureStore(tmp_path / "store").fetch(images, wanted))

        [pid] = ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in pool._actors["sam"]])
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        same(pool.fetch(images, wanted))

        with pytest.raises(ImageError, match="nothing"):
            pool.fetch([ImageRef(path=str(tmp_path / "nothing.png"))], [["sam"]])
        with pytest.raises(ValueError, match="no expert 'vary'"):
            pool.fetch(images[:1], [["vary"]])
    finally:
        pool.close()
