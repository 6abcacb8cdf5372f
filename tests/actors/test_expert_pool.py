import os
import re
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray import serve
from torch.testing import assert_close

from actors.expert_pool import ExpertDeploymentConfig, ExpertPool
from actors.expert_server import ServerError
from actors.ray_metrics import RayTelemetry
from mova_core.experts import load_expert
from mova_core.features import FeatureStore, LocalExperts, Tiered
from mova_core.images import ImageError, ImageRef
from tests.actors import controlled_expert

PAUSE = 0.1  # seconds between two fetches of a caller, so that servers that start get their share of the cores
ROUTING = [["controlled"], ["controlled", "deplot"], [], ["deplot"], ["controlled"]]
# A queue of one image makes `controlled` refuse what comes while it is busy.
EXPERTS = {
    "controlled": ExpertDeploymentConfig(num_cpus=0.5, batch_size=2, server={"size": "mini", "queue": 1}),
    "deplot": ExpertDeploymentConfig(num_cpus=0.5, batch_size=4, server={"size": "mini"}),
}


class Recorder:
    """Telemetry that keeps its observations, and passes them to Ray."""

    def __init__(self):
        self.observed: list[tuple[str, float]] = []
        self.ray = RayTelemetry()

    def observe(self, name: str, value: float, **tags: str) -> None:
        self.observed.append((name.removeprefix("mova_pool_"), value))
        self.ray.observe(name, value, **tags)

    def values(self, name: str) -> list[float]:
        return [value for observed, value in self.observed if observed == name]


@pytest.fixture(scope="module")
def local():
    return LocalExperts({name: load_expert(name, size="mini") for name in EXPERTS})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng, folder = np.random.default_rng(2), tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{index}.png" for index in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return [ImageRef(path=path) for path in paths]


@pytest.fixture(scope="module")
def telemetry():
    return Recorder()


@pytest.fixture(scope="module")
def pool(ray_cluster, telemetry):
    """Two experts, one server each."""
    with opened(EXPERTS, name="pool-test", telemetry=telemetry) as pool:
        yield pool


@contextmanager
def opened(experts, **arguments):
    pool = ExpertPool(experts, **arguments)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def check(local, images):
    """Asserts that a pool's features are those that the experts compute in this process."""
    expected = local.fetch(images, ROUTING)

    def check(rows):
        for row, expected_row in zip(rows, expected, strict=True):
            assert row.keys() == expected_row.keys()
            for name in row:
                assert_close(row[name].tokens, expected_row[name].tokens, atol=1e-5, rtol=0)

    return check


def actors(expert: str) -> set[str]:
    """Names of the actors that serve an expert."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return {name for name in names if re.search(rf"pool-test-{expert}-[0-9a-f]{{16}}#", name)}


def processes() -> set[int]:
    """Process ids of the servers of `controlled` that are alive."""
    pids = {int(path.name) for path in controlled_expert.folder().iterdir() if path.suffix == ""}
    return {pid for pid in pids if os.path.exists(f"/proc/{pid}")} - {os.getpid()}


def application(expert: str) -> str:
    [name] = [name for name in serve.status().applications if name.startswith(f"pool-test-{expert}-")]
    return name


def wait_until(done, seconds=150.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


@contextmanager
def asking(pool, check, images):
    """Two threads that fetch one time after another; yields a list that grows by one with each fetch, which must all succeed."""
    stop, answered = threading.Event(), []

    def ask():
        while not stop.is_set():
            check(pool.fetch(images, ROUTING))
            answered.append(time.monotonic())
            stop.wait(PAUSE)

    with ThreadPoolExecutor(2) as threads:
        callers = [threads.submit(ask) for _ in range(2)]
        try:
            yield answered
        finally:
            stop.set()
        for caller in callers:
            caller.result()


@pytest.mark.ray
class TestAnswers:
    def test_features_are_what_the_experts_compute(self, pool, images, check, local, telemetry):
        check(pool.fetch(images, ROUTING))
        assert pool.fingerprints == local.fingerprints and pool.descriptions == local.descriptions
        assert max(telemetry.values("in_flight")) > 0 and telemetry.values("in_flight")[-1] == 0

    def test_a_store_in_front_writes_and_serves_them(self, pool, images, check, tmp_path):
        with Tiered(FeatureStore(tmp_path / "store", create=True), pool) as tiered:
            check(tiered.fetch(images, ROUTING))
        check(FeatureStore(tmp_path / "store").fetch(images, ROUTING))

    def test_what_cannot_be_answered_is_named(self, pool, images, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        for name in ("nothing", "text"):
            with pytest.raises(ImageError, match=rf"{name}\.png"):
                pool.fetch([ImageRef(path=str(tmp_path / f"{name}.png"))], [["deplot"]])
        with pytest.raises(ValueError, match="no expert 'vary'"):
            pool.fetch(images[:1], [["vary"]])
        with pytest.raises(ValueError, match="no expert 'vary'"):
            pool.scale("vary", 2)

    def test_concurrent_callers_share_computations(self, pool, images, check, telemetry):
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: check(pool.fetch(images, ROUTING)), range(8)))
        assert sum(telemetry.values("joined_total")) > 0

    def test_refused_requests_are_retried(self, pool, telemetry, tmp_path):
        paths = [tmp_path / f"{shade}.png" for shade in range(48)]
        for shade, path in enumerate(paths):
            Image.new("RGB", (40, 40), (shade, 0, 0)).save(path)
        rows = pool.fetch([ImageRef(path=str(path)) for path in paths], [["controlled"]] * len(paths))
        assert all(row.keys() == {"controlled"} for row in rows)
        assert sum(telemetry.values("retried_total")) > 0, "the queue of `controlled` holds one image"

    def test_prometheus_sees_the_servers(self, pool, images, tmp_path):
        pool.fetch(images, ROUTING)
        (tmp_path / "words.png").write_text("no picture")
        with pytest.raises(ImageError, match=r"words\.png"):
            pool.fetch([ImageRef(path=str(tmp_path / "words.png"))], [["deplot"]])
        seen = prometheus("deplot")
        assert seen["images_total"] >= 2 and seen["errors_total"] >= 1
        assert seen["latency_seconds_count"] == seen["images_total"] + seen["errors_total"]
        assert seen["batch_size_count"] >= 1 and seen["batch_size_sum"] > 0
        assert 0 < seen["latency_seconds_sum"] < 60  # Ray's sums are of the middles of buckets
        assert seen["queue_depth"] == 0 and seen["images_per_second"] > 0


@pytest.mark.ray
class TestServers:
    def test_scaling_restarts_no_server_and_drops_no_request(self, pool, images, check):
        pool.fetch(images, ROUTING)
        assert pool.replicas() == {"controlled": 1, "deplot": 1}
        [first] = actors("controlled")
        with asking(pool, check, images) as answered:
            pool.scale("controlled", 2)
            wait_until(lambda: pool.replicas()["controlled"] == 2)
            assert first in actors("controlled")
            pool.scale("controlled", (1, 1))
            wait_until(lambda: len(actors("controlled")) == 1)
            count = len(answered)
            wait_until(lambda: len(answered) > count + 4)

    def test_a_slow_server_does_not_delay_hedged_requests(self, pool, images, check):
        """A second pool shares the servers of the first one."""
        recorder = Recorder()
        hedging = ExpertPool(EXPERTS, name="pool-test", hedge_after_ms=300, telemetry=recorder)
        before = actors("controlled")
        check(hedging.fetch(images, ROUTING))
        assert actors("controlled") == before
        hedging.scale("controlled", 2)
        wait_until(lambda: pool.replicas()["controlled"] == 2)
        with asking(hedging, check, images) as answered:
            slow = controlled_expert.folder() / f"{min(processes())}.hold"
            slow.touch()
            try:
                count = len(answered)
                wait_until(lambda: sum(recorder.values("hedged_total")) > 0 and len(answered) > count + 2)
            finally:
                slow.unlink()
        pool.scale("controlled", 1)
        wait_until(lambda: len(actors("controlled")) == 1)

    def test_a_server_that_dies_or_breaks_is_replaced_and_its_requests_retried(self, pool, images, check):
        check(pool.fetch(images, ROUTING))
        before = actors("controlled") | actors("deplot")
        wait_until(lambda: len(processes()) == 1)  # a process outlives the name of its actor by a moment
        [pid] = processes()
        os.kill(pid, signal.SIGKILL)
        serve.get_app_handle(application("deplot")).close.remote().result()  # alive, but answers nothing any more
        for _ in range(2):
            check(pool.fetch(images, ROUTING))
        assert before.isdisjoint(actors("controlled") | actors("deplot"))

    def test_other_weights_come_up_before_the_old_ones_go(self, ray_cluster, images):
        """Another dtype stands for other weights: both are covered by the fingerprint."""

        def config(dtype):
            return {"controlled": ExpertDeploymentConfig(num_cpus=0.1, server={"size": "mini", "dtype": dtype})}

        wanted = [["controlled"]] * len(images)
        with opened(config("float32"), name="upgrade") as old, opened(config("float16"), name="upgrade") as new:
            old.fetch(images, wanted)
            statuses = []
            with ThreadPoolExecutor(1) as threads:
                upgraded = threads.submit(new.fetch, images, wanted)
                while not upgraded.done():
                    old.fetch(images, wanted)
                    statuses.append(new.replicas().get("controlled"))
                    time.sleep(PAUSE)
                assert {row["controlled"].tokens.dtype for row in upgraded.result()} == {torch.float16}
            assert statuses[0] in (None, 0), "the old servers answered before the new ones ran"
            with pytest.raises(ServerError, match="open a new pool"):
                wait_until(lambda: not old.fetch(images, wanted))

    def test_an_expert_that_cannot_start_says_why(self, ray_cluster, images):
        config = ExpertDeploymentConfig(num_cpus=0.1, server={"size": "mini", "weights": "/nowhere"})
        no_answer = pytest.raises(ServerError, match=r"no server of sam answers: .*nowhere")
        with opened({"sam": config}, name="bad") as bad, no_answer:
            bad.fetch(images[:1], [["sam"]])

    @pytest.mark.parametrize("replicas", [0, (0, 2), (3, 2), 10_000])
    def test_impossible_numbers_of_servers_are_refused(self, replicas):
        with pytest.raises(ValueError, match="replicas"):
            ExpertDeploymentConfig(replicas=replicas)


def prometheus(expert: str) -> dict[str, float]:
    """What Prometheus reads of a server that has met one error."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end, seen = time.monotonic() + 60, dict[str, float]()
    gauges = {"queue_depth", "images_per_second"}
    # Ray passes metrics on every ten seconds, and not all of them at once.
    while time.monotonic() < end and not (seen.get("errors_total") and gauges <= seen.keys()):
        time.sleep(0.5)
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.findall(rf'^ray_mova_expert_(\w+)\{{[^}}]*expert="{expert}"[^}}]*\}} (\S+)$', page, re.M)
        seen = {name: float(value) for name, value in found}
    return seen
