import dataclasses
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from actors.expert_server import DeviceLost, ExpertServer, ServerBusy, ServerError
from mova_core.experts import ExpertCard, Features, VisionExpert, register
from mova_core.experts.cost import Measured
from mova_core.features import FeatureStore
from mova_core.images import ImageError, ImageRef, square_pixels

RED, PINK = (255, 0, 0), (255, 0, 255)  # what a Picky cannot digest, and what it makes infinite


@register
class Picky(VisionExpert):
    """A real expert, whose features are its pixels at 2x2; what it takes can be limited while it serves."""

    preprocessing = "square-1"
    card = ExpertCard(
        name="picky",
        title="Picky",
        description="This model averages colours.",
        weights="",
        full={"image_size": 8, "channels": 3},
        mini={"image_size": 8, "channels": 3},
    )
    most = 1000  # pictures that the memory holds

    def __init__(self, arch):
        super().__init__(arch)
        self.one = torch.nn.Parameter(torch.ones(1))
        self.batches: list[int] = []  # pictures of each forward pass
        self.open = threading.Event()  # closed, no pass ends
        self.open.set()

    @property
    def grid(self):
        return 2, 2

    def preprocess(self, images, compat="fixed"):
        return {"pixel_values": square_pixels(images, 8, (0.0,) * 3, (1.0,) * 3, compat)}

    def forward(self, batch):
        pixels = batch["pixel_values"]
        self.batches.append(len(pixels))
        self.open.wait()
        if len(pixels) > self.most:
            torch.empty(1 << 60)  # the allocator's own refusal
        means = pixels.mean((2, 3))
        if (means == torch.tensor([1.0, 0.0, 0.0])).all(1).any():
            raise RuntimeError("cannot digest this")
        infinite = (means == torch.tensor([1.0, 0.0, 1.0])).all(1)
        tokens = F.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2) * self.one
        return Features(tokens / (~infinite[:, None, None]).float(), self.grid)


@register
class Greedy(Picky):
    """The same, on a device whose memory holds three pictures from the start."""

    card = dataclasses.replace(Picky.card, name="greedy")
    most = 3


class Recorder:
    """Keeps what it is told."""

    def __init__(self):
        self.told: list[tuple[str, float]] = []

    def observe(self, name: str, value: float, **tags: str) -> None:
        assert tags == {"expert": "picky"}
        self.told.append((name, value))

    def values(self, name: str) -> list[float]:
        return [value for told, value in self.told if told == f"mova_expert_{name}"]


@pytest.fixture
def server():
    """Serves `Picky`; give it what else it needs. Closed at the end."""
    opened = []

    def start(expert: str = "picky", **arguments) -> ExpertServer:
        opened.append(ExpertServer(expert, size="mini", **{"batch_size": 8, "wait_ms": 50.0, **arguments}))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def passes(server: ExpertServer) -> list[int]:
    """Pictures of each forward pass since it is ready."""
    assert isinstance(server.expert, Picky)
    return server.expert.batches[1:]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    paths = [folder / f"{index}.png" for index in range(8)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    Image.new("RGB", (9, 9), RED).save(folder / "red.png")
    Image.new("RGB", (9, 9), PINK).save(folder / "pink.png")
    (folder / "bad.png").write_bytes(paths[0].read_bytes()[:200])
    return folder


def refs(folder, *names) -> list[ImageRef]:
    return [ImageRef(path=str(folder / f"{name}.png")) for name in names]


def right(results, images) -> list[bool]:
    """Which results are the features of their pictures."""
    expert = Picky(Picky.card.mini)
    with torch.no_grad():
        wanted = [expert(expert.preprocess([image])).tokens[0] for image in images]
    return [
        isinstance(got, Features) and torch.equal(got.tokens, one) for got, one in zip(results, wanted, strict=True)
    ]


def shard_of(partition, images):
    shard = partition.plan([image.key for image in images], 100)[0]
    paths = {image.key: image.path for image in images}
    keys = [bytes.fromhex(key) for key in shard.keys]
    return pa.Table.from_pylist([{"shard": shard.id, "keys": keys, "images": [paths[key] for key in shard.keys]}])


def computed(result) -> Features:
    assert isinstance(result, Features), result
    return result


class TestPublishedExperts:
    def test_features_of_good_pictures_beside_a_bad_one(self, server, pictures):
        biomedclip = server("biomedclip", batch_size=2)
        results = biomedclip.features(refs(pictures, *range(5), "bad"))
        assert [isinstance(result, ImageError) for result in results] == [False] * 5 + [True]
        alone = computed(biomedclip.features(refs(pictures, 3))[0])
        assert alone.tokens.shape == (16, 64) and alone.grid == (4, 4)
        torch.testing.assert_close(alone.tokens, computed(results[3]).tokens, atol=1e-5, rtol=0)

    def test_a_shard_is_stored_once_and_its_report_names_failures(self, server, pictures, tmp_path):
        path = FeatureStore(tmp_path / "store", create=True).location
        sam = server("sam", batch_size=2, queue=3, store=path)  # a shard may be longer than the queue
        shard = shard_of(sam.store.add_expert(sam.description), refs(pictures, *range(5), "bad"))
        [line] = [row for table in sam(shard) for row in table.to_pylist()]
        assert (line["shard"], line["stored"]) == (shard["shard"][0].as_py(), 5)
        assert [bad["image"] for bad in line["failed"]] == [str(pictures / "bad.png")]
        load = sam.load()
        assert (load["computed"], load["stored"], load["waiting"]) == (5, 5, 0)
        assert load["busy"] > 0 and load["prepare"] > 0

        store = FeatureStore(tmp_path / "store")
        assert store.stat()["experts"]["sam"]["features"] == 5
        assert line["bytes"] == store.stat()["experts"]["sam"]["bytes"]
        assert [(bad["image"], bad["expert"]) for bad in store.quarantined()] == [(str(pictures / "bad.png"), "sam")]
        [stored] = store.fetch(refs(pictures, 0), [["sam"]])
        again = computed(sam.features(refs(pictures, 0))[0])
        torch.testing.assert_close(stored["sam"].tokens, again.tokens, atol=1e-5, rtol=0)

        shards = sorted((tmp_path / "store").rglob("*.safetensors"))
        [line] = [row for table in sam(shard) for row in table.to_pylist()]
        assert line["stored"] == 0 and sorted((tmp_path / "store").rglob("*.safetensors")) == shards, "not made again"

    def test_a_suspect_shard_is_computed_image_by_image_without_the_refused(self, server, pictures, tmp_path):
        FeatureStore(tmp_path / "store", create=True)
        picky = server(store=str(tmp_path / "store"))
        images = refs(pictures, *range(4), "pink")
        shard = shard_of(picky.store.add_expert(picky.description), images)
        refused = {images[2].key: "the process that computes it crashed"}
        begun: list[tuple[str, int]] = []
        server_call = picky(shard, refused, lambda key: begun.append((key, len(passes(picky)))))
        [row] = [row for table in server_call for row in table.to_pylist()]
        left = [key.hex() for key in shard["keys"][0].as_py() if key.hex() not in refused]
        assert begun == [(key, number) for number, key in enumerate(left)] and passes(picky) == [1] * 4
        assert row["stored"] == 3
        reasons = {failed["image"]: failed["reason"] for failed in row["failed"]}
        assert reasons == {
            images[2].path: "the process that computes it crashed",
            images[4].path: "its features are not finite in float32",
        }
        listed = {row["image"]: (row["sha256"], row["reason"]) for row in picky.store.quarantined()}
        assert listed == {image.path: (image.key, reasons[image.path]) for image in (images[2], images[4])}

    def test_the_image_named_last_is_the_one_that_lost_the_device(self, server, pictures, tmp_path, monkeypatch):
        FeatureStore(tmp_path / "store", create=True)
        picky = server(store=str(tmp_path / "store"))
        shard = shard_of(picky.store.add_expert(picky.description), refs(pictures, *range(4)))
        begun: list[str] = []

        def lose_device(batch):
            raise torch.AcceleratorError("the device is gone")

        def begin(key: str) -> None:
            begun.append(key)
            if len(begun) == 2:
                monkeypatch.setattr(picky.expert, "forward", lose_device)

        with pytest.raises(DeviceLost, match="picky lost cpu"):
            list(picky(shard, None, begin))
        assert begun == [key.hex() for key in shard["keys"][0].as_py()[:2]]

    def test_an_image_that_went_since_it_was_listed_is_tried_by_the_next_run(self, server, pictures, tmp_path):
        FeatureStore(tmp_path / "store", create=True)
        picky = server(store=str(tmp_path / "store"))
        gone = tmp_path / "gone.png"
        gone.write_bytes((pictures / "0.png").read_bytes())
        image = ImageRef(path=str(gone))
        shard = shard_of(picky.store.add_expert(picky.description), [image])
        gone.unlink()
        [row] = [row for table in picky(shard) for row in table.to_pylist()]
        assert row["stored"] == 0 and row["failed"][0]["reason"] == "cannot be read (No such file or directory)"
        [listed] = picky.store.quarantined()
        assert listed["image"] == str(gone) and listed["sha256"] is None and listed["expert"] == "picky"

    def test_one_shard_is_computed_while_another_is_written(self, server, pictures, tmp_path, monkeypatch):
        """Two threads call, as Ray Data has them: the second's pictures are answered while the first still writes."""
        store = FeatureStore(tmp_path / "store", create=True)
        sam = server("sam", batch_size=2, store=store.location)
        partition = sam.store.add_expert(sam.description)
        shards = [shard_of(partition, refs(pictures, *part)) for part in ((0, 1, 2), (3, 4, 5))]
        first_is_written, both_computed = threading.Event(), threading.Event()
        write = type(partition).write

        def slow(self, shard_id, features):
            if not first_is_written.is_set():
                first_is_written.set()
                assert both_computed.wait(30)
            return write(self, shard_id, features)

        monkeypatch.setattr(type(partition), "write", slow)
        with ThreadPoolExecutor(2) as calls:
            done = [calls.submit(lambda shard: list(sam(shard)), shard) for shard in shards]
            assert first_is_written.wait(30)
            while sam.load()["computed"] < 6:
                time.sleep(0.01)
            both_computed.set()
            assert [one.result()[0]["stored"][0].as_py() for one in done] == [3, 3]

    def test_what_is_stored_may_be_smaller_than_what_is_computed(self, server, pictures, tmp_path):
        store = FeatureStore(tmp_path / "store", create=True)
        sam = server("sam", batch_size=2, store=store.location, stored="int8")
        assert sam.dtype is torch.float32 and sam.description["dtype"] == "int8"
        list(sam(shard_of(sam.store.add_expert(sam.description), refs(pictures, 0))))
        [stored] = FeatureStore(tmp_path / "store").fetch(refs(pictures, 0), [["sam"]])
        tokens = computed(sam.features(refs(pictures, 0))[0]).tokens
        assert (stored["sam"].tokens - tokens).norm() / tokens.norm() < 0.02

    def test_without_a_store_the_error_says_so(self, server):
        with pytest.raises(ValueError, match="given no store"):
            next(server("sam")(pa.table({"shard": []})))


class TestBatching:
    def test_callers_share_a_forward_pass(self, server, pictures):
        picky = server(batch_size=6, wait_ms=5000.0)
        images = refs(pictures, *range(6))
        with ThreadPoolExecutor(6) as callers:
            results = [one for [one] in callers.map(lambda image: picky.features([image]), images)]
        assert passes(picky) == [6]
        assert all(right(results, images))
        assert all(result.tokens.untyped_storage().nbytes() == 2 * 2 * 3 * 4 for result in results), "no other's beside"

    def test_a_lone_picture_waits_at_most_wait_ms(self, server, pictures):
        picky = server(batch_size=64, wait_ms=200.0)
        started = time.monotonic()
        picky.features(refs(pictures, 0))
        assert 0.2 <= time.monotonic() - started < 5
        assert passes(picky) == [1]

    def test_a_full_queue_refuses(self, server, pictures):
        picky = server(batch_size=1, queue=4)
        with pytest.raises(
            ServerBusy, match=r"server of picky has 0 pictures waiting and room for 4, so it takes no 5 more"
        ):
            picky.features(refs(pictures, *range(5)))
        picky.expert.open.clear()
        with ThreadPoolExecutor(8) as callers:
            asked: list[Future[list[Features | ImageError]]] = []
            while picky.check_health()["waiting"] < 4:  # beside one on the device, one ready and one being gathered
                asked.append(callers.submit(picky.features, refs(pictures, len(asked))))
                time.sleep(0.1)
            with pytest.raises(ServerBusy, match="has 4 pictures waiting"):
                picky.features(refs(pictures, 0))
            picky.expert.open.set()
            assert len(asked) == 7
            assert all(right([one.result()[0] for one in asked], refs(pictures, *range(7))))

    def test_metrics_are_reported(self, server, pictures):
        told = Recorder()
        picky = server(batch_size=4, telemetry=told)
        picky.features(refs(pictures, *range(6), "bad"))
        assert sum(told.values("batch_size")) == 6 and max(told.values("batch_size")) == 4
        assert sum(told.values("images_total")) == 6 and sum(told.values("errors_total")) == 1
        assert len(told.values("latency_seconds")) == 7 and all(0 < s < 5 for s in told.values("latency_seconds"))
        assert told.values("queue_depth")[-1] == 0 and max(told.values("queue_depth")) == 7
        assert all(speed > 0 for speed in told.values("images_per_second"))

    def test_a_closed_server_answers_nobody(self, server, pictures):
        picky = server()
        picky.close()
        for use in (lambda: picky.features(refs(pictures, 0)), picky.check_health):
            with pytest.raises(ServerError, match="was closed"):
                use()


class TestTrouble:
    def test_a_batch_that_does_not_fit_is_split_and_the_size_remembered(self, server, pictures):
        told = Recorder()
        picky = server(telemetry=told)
        picky.expert.most = 3
        images = refs(pictures, *range(8))
        assert all(right(picky.features(images), images))
        assert passes(picky) == [8, 4, 2, 2, 2, 2]
        assert picky.check_health()["batch_size"] == 2 and sum(told.values("splits_total")) == 2
        assert all(right(picky.features(images[:4]), images[:4]))
        assert passes(picky)[6:] == [2, 2]

    def test_a_picture_that_does_not_fit_alone_gets_its_error(self, server, pictures):
        picky = server()
        picky.expert.most = 0
        images = refs(pictures, 0, 1)
        for image, result in zip(images, picky.features(images), strict=True):
            assert isinstance(result, ImageError)
            assert f"{image.path}: picky: does not fit the memory of cpu even alone" in str(result)
        picky.expert.most = 1000
        assert all(right(picky.features(images), images)), "it goes on"

    @pytest.mark.parametrize(("name", "reason"), [("red", "cannot digest this"), ("pink", "not finite in float32")])
    def test_a_bad_picture_fails_alone(self, server, pictures, name, reason):
        picky = server()
        images = refs(pictures, 0, 1, name, 2, 3)
        results = picky.features(images)
        assert [isinstance(result, ImageError) for result in results] == [False, False, True, False, False]
        assert str(results[2]).startswith(f"{pictures / name}.png: picky: ") and reason in str(results[2])
        assert all(right(results[:2] + results[3:], images[:2] + images[3:]))
        assert passes(picky) == ([5, 1, 1, 1, 1, 1] if name == "red" else [5])

    def test_an_expert_that_always_fails_is_reported_unhealthy(self, server, pictures):
        """Else a bug would put every picture of a run into quarantine."""
        picky = server()
        with pytest.raises(ServerError, match=r"picky failed on all of its first 32 pictures; the last: .*red.png"):
            picky.features(refs(pictures, *["red"] * 40))
        for use in (picky.check_health, lambda: picky.features(refs(pictures, 0))):
            with pytest.raises(ServerError, match="all of its first 32"):
                use()

    def test_preprocessing_that_fails_is_one_pictures_error(self, server, pictures, monkeypatch):
        picky = server()
        prepare = picky.expert.preprocess

        def fragile(images, compat="fixed"):
            if any(image.path.endswith("2.png") for image in images):
                raise ZeroDivisionError("by nought")
            return prepare(images, compat)

        monkeypatch.setattr(picky.expert, "preprocess", fragile)
        results = picky.features(refs(pictures, 1, 2, 3))
        assert [isinstance(result, ImageError) for result in results] == [False, True, False]
        assert "2.png: picky cannot prepare it (ZeroDivisionError: by nought)" in str(results[1])

    @pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"queue": 0}])
    def test_no_room_for_one_picture_is_refused(self, server, arguments):
        with pytest.raises(ValueError, match="must be at least 1"):
            server(**arguments)

    def test_an_expert_that_cannot_start_says_why(self, server):
        Greedy.most = 0
        try:
            with pytest.raises(ServerError, match=r"greedy cannot compute on cpu: .*allocate memory"):
                server("greedy")
        finally:
            Greedy.most = 3


class TestWarmUp:
    def test_one_pass_on_a_cpu(self, server):
        assert server().expert.batches == [1]

    def test_every_shape_where_shapes_are_fixed(self, server, pictures):
        picky = server(batch_size=6, fixed_shapes=True)
        assert picky.expert.batches == [1, 2, 4, 6] and picky.check_health()["warm"] == [1, 2, 4, 6]
        for count, shape in ((3, 4), (5, 6), (6, 6), (1, 1)):
            images = refs(pictures, *range(count))
            assert all(right(picky.features(images), images))
            assert picky.expert.batches[-1] == shape
        picky.expert.most = 5
        assert all(right(picky.features(images := refs(pictures, *range(6))), images))
        assert picky.batch_size == 2 and picky.expert.batches[-4:] == [6, 2, 2, 2], "a size that is warm"

    def test_warm_up_ends_at_the_first_shape_that_does_not_fit(self, server):
        greedy = server("greedy", fixed_shapes=True)
        assert greedy.check_health() | {"warm": [1, 2], "batch_size": 2} == greedy.check_health()

    def test_batch_size_is_measured(self, server, pictures):
        started = time.monotonic()
        picky = server(batch_size=None, measure_seconds=0.5)
        assert time.monotonic() - started < 5
        assert picky.profile is not None
        tried = [one.batch for one in picky.profile.batches]
        assert tried == [2**power for power in range(len(tried))] and picky.batch_size in tried
        assert picky.profile.best().batch == picky.batch_size
        greedy = server("greedy", batch_size=None)
        assert greedy.profile is not None and greedy.profile.batches[-1].batch <= 2 and greedy.batch_size <= 2

    def test_batch_size_of_a_profile(self, server):
        measured = server(batch_size=None, measure_seconds=0.1).profile
        assert measured is not None
        speeds = {1: 10.0, 2: 19.0, 4: 40.0, 8: 41.0}
        known = dataclasses.replace(
            measured,
            batches=[Measured(batch=b, images_per_second=speed, peak_bytes=b << 20) for b, speed in speeds.items()],
        )
        picky = server(batch_size=None, profiles=[known])
        assert picky.batch_size == 4 and picky.expert.batches == [1], "nothing was measured"
        assert server(batch_size=3, profiles=[known]).batch_size == 3, "what is asked for goes before"
        elsewhere = dataclasses.replace(known, device="NVIDIA H100")
        assert sum(server(batch_size=None, measure_seconds=0.1, profiles=[elsewhere]).expert.batches) > 1
