import re
import time
import urllib.request

import numpy as np
import pytest
import ray
from PIL import Image

from actors.expert_pool import ExpertPool, Servers
from actors.telemetry import RayTelemetry
from mova_core.images import ImageRef


def test_outside_of_a_session_nobody_is_told():
    RayTelemetry().observe("mova_expert_queue_depth", 1, expert="sam")
    with pytest.raises(KeyError):
        RayTelemetry().observe("mova_expert_weather", 1)


@pytest.mark.ray
def test_prometheus_reads_what_a_server_tells(ray_cluster, tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pool = ExpertPool({"biomedclip": Servers(num_cpus=0.5, batch_size=4, server={"size": "mini"})})
    try:
        pool.fetch([ImageRef(path=str(tmp_path / "0.png"))] * 6, [["biomedclip"]] * 6)
        with pytest.raises(ValueError, match=r"bad\.png"):
            pool.fetch([ImageRef(path=str(tmp_path / "bad.png"))], [["biomedclip"]])

        [node] = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        until = time.monotonic() + 45  # Ray passes metrics on every ten seconds
        told: dict[str, float] = {}
        while time.monotonic() < until and told.get("errors_total") != 1:
            time.sleep(1)
            page = urllib.request.urlopen(url, timeout=10).read().decode()
            told = {
                name: float(value)
                for name, value in re.findall(
                    r'^ray_mova_expert_(\w+)\{[^}]*expert="biomedclip"[^}]*\} (\S+)$', page, re.M
                )
            }
    finally:
        pool.close()
    assert told["images_total"] == 6 and told["errors_total"] == 1
    assert told["latency_seconds_count"] == 7 and told["batch_size_count"] >= 2  # Ray's sums are of bucket middles
    assert 0 < told["latency_seconds_sum"] < 60 and told["batch_size_sum"] > 0
    assert told["queue_depth"] == 0 and told["images_per_second"] > 0
