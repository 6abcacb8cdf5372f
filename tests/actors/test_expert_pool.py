import os
import re
import signal
import time
import urllib.request

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from actors.expert_pool import ExpertPool, Servers
from actors.expert_server import ServerError
from actors.telemetry import RayTelemetry
from mova_core.experts import load_expert
from mova_core.features import FeatureStore, LocalExperts, Tiered
from mova_core.images import ImageError, ImageRef


@pytest.mark.ray
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
            pool.fetch([ImageRef(path=str(tmp_path / "nothing.png"))], [["deplot"]])
        with pytest.raises(ValueError, match="no expert 'vary'"):
            pool.fetch(images[:1], [["vary"]])
        told = prometheus("deplot")

        ray.get([actor.__ray_call__.remote(lambda self: self.close()) for actor in pool._actors["deplot"]])
        with pytest.raises(ServerError, match="the server of deplot was closed"):
            pool.fetch(images[:1], [["deplot"]])
        same(pool.fetch(images, wanted))  # it was started again
    finally:
        pool.close()
    assert told["images_total"] == 6 and told["errors_total"] == 1
    assert told["latency_seconds_count"] == 7 and told["batch_size_count"] >= 3  # Ray's sums are of bucket middles
    assert 0 < told["latency_seconds_sum"] < 60 and told["batch_size_sum"] > 0
    assert told["queue_depth"] == 0 and told["images_per_second"] > 0


def prometheus(expert: str) -> dict[str, float]:
    """What Prometheus reads of a server that has met one error."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until, told = time.monotonic() + 45, dict[str, float]()
    while time.monotonic() < until and not told.get("errors_total"):  # Ray passes metrics on every ten seconds
        time.sleep(0.5)
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.findall(rf'^ray_mova_expert_(\w+)\{{[^}}]*expert="{expert}"[^}}]*\}} (\S+)$', page, re.M)
        told = {name: float(value) for name, value in found}
    return told


def test_outside_of_a_session_nobody_is_told():
    telemetry = RayTelemetry()
    telemetry.observe("mova_expert_queue_depth", 1, expert="sam")
    with pytest.raises(KeyError):
        telemetry.observe("mova_expert_weather", 1)
