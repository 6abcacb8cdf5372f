import os
import re
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from actors.expert_pool import SERVE_NAMESPACE, ExpertDeploymentConfig, ExpertPool
from actors.expert_server import ServerError
from actors.ray_metrics import RayTelemetry
from mova_core.experts import load_expert
from mova_core.features import FeatureStore, LocalExperts, Tiered
from mova_core.images import ImageError, ImageRef

WANTED = [["sam"], ["sam", "deplot"], [], ["deplot"], ["sam"]]


class Recorder:
    """Keeps what it is told, and tells Ray."""

    def __init__(self):
        self.told: list[tuple[str, float]] = []
        self.ray = RayTelemetry()

    def observe(self, name: str, value: float, **tags: str) -> None:
        self.told.append((name.removeprefix("mova_pool_"), value))
        self.ray.observe(name, value, **tags)

    def total(self, name: str) -> float:
        return sum(value for told, value in self.told if told == name)


@pytest.fixture(scope="module")
def local():
    return LocalExperts({name: load_expert(name, size="mini") for name in ("sam", "deplot")})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng, folder = np.random.default_rng(2), tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{index}.png" for index in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return [ImageRef(path=path) for path in paths]


@pytest.fixture(scope="module")
def pool(ray_cluster):
    """Two experts, one server each; its queue of one makes `sam` refuse what comes meanwhile."""
    pool = ExpertPool(
        {
            "sam": ExpertDeploymentConfig(num_cpus=0.5, batch_size=2, server={"size": "mini", "queue": 1}),
            "deplot": ExpertDeploymentConfig(num_cpus=0.5, batch_size=4, server={"size": "mini"}),
        },
        name="pool-test",
        telemetry=Recorder(),
    )
    yield pool
    pool.close()


@pytest.fixture
def same(local, images):
    """Whether a pool's answers are what the experts compute here."""
    expected = local.fetch(images, WANTED)

    def check(rows):
        for got, wanted in zip(rows, expected, strict=True):
            assert got.keys() == wanted.keys()
            for name in got:
                torch.testing.assert_close(got[name].tokens, wanted[name].tokens, atol=1e-5, rtol=0)

    return check


def actors(expert: str) -> list[str]:
    """Names of the actors that serve an expert."""
    named = ray.util.list_named_actors(all_namespaces=True)
    wanted = f"SERVE_REPLICA::pool-test-{expert}#"
    return [one["name"] for one in named if one["namespace"] == SERVE_NAMESPACE and one["name"].startswith(wanted)]


def call(actor: str, function):
    return ray.get(ray.get_actor(actor, namespace=SERVE_NAMESPACE).__ray_call__.remote(lambda self: function()))


def pace(batch_size: int, queue: int, wait: float) -> None:
    """From now on the server in this process waits so long, seconds, for so many pictures."""
    [gathering] = [thread for thread in threading.enumerate() if thread.name == "sam-_gather"]
    server = gathering._target.__self__  # type: ignore[attr-defined]
    with server._changed:
        server.batch_size, server.queue, server.wait = batch_size, queue, wait
        server._changed.notify_all()


def until(done, seconds=150.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


@pytest.mark.ray
def test_pool_serves_what_the_experts_compute(pool, images, same, local, tmp_path):
    same(pool.fetch(images, WANTED))
    assert pool.fingerprints == local.fingerprints and pool.descriptions == local.descriptions
    assert pool._telemetry.total("in_flight") > 0 and pool._in_flight == {"sam": 0, "deplot": 0}
    with Tiered(FeatureStore(tmp_path / "store", create=True), pool) as tiered:
        same(tiered.fetch(images, WANTED))
    same(FeatureStore(tmp_path / "store").fetch(images, WANTED))
    with pytest.raises(ImageError, match="nothing"):
        pool.fetch([ImageRef(path=str(tmp_path / "nothing.png"))], [["deplot"]])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"text\.png"):
        pool.fetch([ImageRef(path=str(tmp_path / "text.png"))], [["deplot"]])
    with pytest.raises(ValueError, match="no expert 'vary'"):
        pool.fetch(images[:1], [["vary"]])
    with ThreadPoolExecutor(8) as threads:  # together they ask once
        list(threads.map(lambda _: same(pool.fetch(images, WANTED)), range(8)))
    assert pool._telemetry.total("joined_total") > 0

    many = [tmp_path / f"{shade}.png" for shade in range(48)]
    for shade, path in enumerate(many):
        Image.new("RGB", (40, 40), (shade, 0, 0)).save(path)
    fetched = pool.fetch([ImageRef(path=str(path)) for path in many], [["sam"]] * len(many))
    assert all(row.keys() == {"sam"} for row in fetched)
    assert pool._telemetry.total("retried_total") > 0, "sam has room for one picture at a time"


@pytest.mark.ray
def test_scaled_up_and_down_no_request_is_dropped(pool, images, same):
    pool.fetch(images, WANTED)
    stop, answered = threading.Event(), []
    pool.hedge_after = 0.3

    def ask():
        while not stop.is_set():
            same(pool.fetch(images, WANTED))
            answered.append(pool.replicas()["sam"])

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            assert pool.replicas() == {"sam": 1, "deplot": 1}
            [first] = actors("sam")
            pool.scale("sam", 2)
            until(lambda: answered[-1:] == [2])
            assert first in actors("sam"), "to scale starts no server anew"
            hedged, quick = pool._telemetry.total("hedged_total"), len(answered)
            call(first, partial(pace, 64, 64, 120.0))  # a straggler: what it was asked, the other answers
            until(lambda: pool._telemetry.total("hedged_total") > hedged and len(answered) > quick + 2)
            pool.hedge_after = None
            call(first, partial(pace, 2, 1, 0.01))
            pool.scale("sam", 1)
            until(lambda: len(actors("sam")) == 1 and answered[-1:] == [1])
        finally:
            stop.set()
        for one in asking:
            one.result()


@pytest.mark.ray
def test_a_server_that_dies_or_breaks_is_replaced_and_its_work_redone(pool, images, same, tmp_path):
    same(pool.fetch(images, WANTED))
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"words\.png"):
        pool.fetch([ImageRef(path=str(tmp_path / "words.png"))], [["deplot"]])
    told = prometheus("deplot")
    assert told["images_total"] >= 2 and told["errors_total"] >= 1
    assert (
        told["latency_seconds_count"] == told["images_total"] + told["errors_total"] and told["batch_size_count"] >= 1
    )
    assert 0 < told["latency_seconds_sum"] < 60 and told["batch_size_sum"] > 0  # Ray's sums are of bucket middles
    assert told["queue_depth"] == 0 and told["images_per_second"] > 0

    [killed], [broken] = actors("sam"), actors("deplot")
    os.kill(call(killed, os.getpid), signal.SIGKILL)
    pool._handles["deplot"].close.remote().result()  # it answers nothing any more, but lives
    for _ in range(2):
        same(pool.fetch(images, WANTED))
    assert {killed, broken}.isdisjoint(actors("sam") + actors("deplot"))


@pytest.mark.ray
def test_an_expert_that_cannot_start_says_why(ray_cluster, images):
    pool = ExpertPool(
        {"sam": ExpertDeploymentConfig(num_cpus=0.1, server={"size": "mini", "weights": "/nowhere"})}, name="bad"
    )
    try:
        with pytest.raises(ServerError, match=r"no server of sam answers: .*nowhere"):
            pool.fetch(images[:1], [["sam"]])
    finally:
        pool.close()


def prometheus(expert: str) -> dict[str, float]:
    """What Prometheus reads of a server that has met one error."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until, told = time.monotonic() + 60, dict[str, float]()
    gauges = {"queue_depth", "images_per_second"}
    # Ray passes metrics on every ten seconds, and not all of them at once.
    while time.monotonic() < until and not (told.get("errors_total") and gauges <= told.keys()):
        time.sleep(0.5)
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.findall(rf'^ray_mova_expert_(\w+)\{{[^}}]*expert="{expert}"[^}}]*\}} (\S+)$', page, re.M)
        told = {name: float(value) for name, value in found}
    return told


@pytest.mark.ray
def test_the_page_on_features_runs_as_it_stands(ray_cluster, tmp_path, images, monkeypatch, capsys):
    """docs/features.md: serve, then read in training what serving has stored."""
    snippets = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "features.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)
    for image, name in zip(images, ("cat", "dog"), strict=False):
        (tmp_path / f"{name}.png").write_bytes(Path(image.path).read_bytes())
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/features.md", "exec"), names)
    assert len(snippets) == 2 and capsys.readouterr().out == "torch.Size([64, 32]) (8, 8)\n2 epochs done\n"


def test_outside_of_a_session_nobody_is_told():
    telemetry = RayTelemetry()
    telemetry.observe("mova_expert_queue_depth", 1, expert="sam")
    with pytest.raises(KeyError):
        telemetry.observe("mova_expert_weather", 1)
