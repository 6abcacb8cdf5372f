"""The feature store on an object store: moto's S3 server, reliable or failing one request in twenty."""

import pickle
import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import fsspec
import pytest
import tenacity
import torch
import werkzeug.serving
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from mova_core.features import FeatureStore, StoreError
from mova_core.features.storage import ObjectStorage
from mova_core.io import filesystem
from tests.mova_core.features.test_store import KEYS, describe, features, fill, key, same


class Server:
    """moto's S3 behind a WSGI layer that records requests, fails some of them, and may ignore If-None-Match."""

    def __init__(self):
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.asked, self.failed = [], 0
        self.failing, self.draw = 0.0, random.Random(0)
        self.forgets_conditions = False
        self.lock, self.conditional = threading.Lock(), threading.Lock()
        self.http = werkzeug.serving.make_server("127.0.0.1", 0, self, threaded=True)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def __call__(self, environ, start_response):
        with self.lock:
            self.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
            fault = self.draw.choice(("500", "503", "cut", "lost")) if self.draw.random() < self.failing else ""
            self.failed += bool(fault)
        if self.forgets_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if fault in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{fault} Out of order", [("Content-Length", "0")])
            return [b""]
        if fault == "lost":  # carried out, but the reply is lost
            self._carry_out(environ, lambda *_: None)
        if fault:
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return self._carry_out(environ, start_response)

    def _carry_out(self, environ, start_response):
        # S3 checks the condition and writes in one step; moto checks, then writes, and another thread may write between.
        with self.conditional if "HTTP_IF_NONE_MATCH" in environ else nullcontext():
            return [b"".join(self.moto(environ, start_response))]

    def close(self):
        self.http.shutdown()
        self.thread.join()


@pytest.fixture(scope="module")
def running():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(running, monkeypatch, tmp_path):
    """The server with an empty bucket, and the environment variables that direct fsspec to it."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.http.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MOVA_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # cached instances keep the endpoint of an earlier test
    running.failing, running.forgets_conditions = 0.0, False
    bucket = f"bucket-{running.draw.randrange(10**9)}"
    fsspec.filesystem("s3").mkdir(bucket)
    running.url = f"s3://{bucket}/stores/one"
    return running


def objects(store):
    """The names of all objects of a store."""
    files, root = fsspec.url_to_fs(store.location, use_listings_cache=False)
    return {path.removeprefix(f"{root}/") for path in files.find(root)}


def test_requests(server):
    """A row takes at most one request, neighbouring rows share one, and no request asks for a size first."""
    partition = FeatureStore(server.url, create=True).add_expert(describe())
    server.asked.clear()
    fill(partition, KEYS[:6])
    [put] = [path for method, path, _ in server.asked if method == "PUT" and "/shards/" in path]
    assert [method for method, *_ in server.asked if method == "PUT"] == ["PUT"] * 2, "shard and receipt"
    big = features(KEYS[6:12], grid=(200, 200), channels=64)  # 10 MiB a row: more than one merged request may read
    partition.write("a" * 32, big)
    reader = FeatureStore(server.url).partition("clip")
    server.asked.clear()
    assert same(reader, KEYS[:6])
    size = 5 * 4096 + 15 * 7 * 4
    assert server.asked == [("GET", put, f"bytes=4096-{4096 + size - 1}")], "six rows, one request"
    server.asked.clear()
    assert all(torch.equal(row.tokens, big[name].tokens) for name, row in zip(big, reader.read(list(big)), strict=True))
    assert len(server.asked) == 6 and {method for method, *_ in server.asked} == {"GET"}


def test_snapshots_are_cached_locally(server, tmp_path):
    store = FeatureStore(server.url, create=True)
    fill(store.add_expert(describe()), KEYS[:12])
    assert store.partition("clip").snapshot() == 1
    fill(store.partition("clip"), KEYS)
    again = FeatureStore(server.url)
    server.asked.clear()
    assert same(pickle.loads(pickle.dumps(again)).partition("clip"), KEYS)
    assert not any("/index/" in path for _, path, _ in server.asked), "the local copy is used"
    assert sum("/receipts/" in path for _, path, _ in server.asked) == 2, "receipts newer than the snapshot only"
    assert store.partition("clip").snapshot() == 2
    [kept] = (tmp_path / "cache").rglob("*-*")
    assert kept.stat().st_size and same(FeatureStore(server.url).partition("clip"), KEYS)
    assert store.gc(-60)["files"] == 2, "the superseded index and its snapshot"
    assert same(FeatureStore(server.url).partition("clip"), KEYS)


def test_a_server_that_fails(server, monkeypatch):
    """One request in twenty is refused, cut off, or carried out without a reply; s3fs itself does not retry."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(filesystem, "WAIT", tenacity.wait_fixed(0.01))
    server.failing, server.failed, server.draw = 0.05, 0, random.Random(0)
    keys = [key(number) for number in range(60)]

    def write(_):
        partition = FeatureStore(server.url, create=True).add_expert(describe())
        fill(partition, keys, rows_per_shard=4)

    with ThreadPoolExecutor(2) as writers:  # of the same work
        list(writers.map(write, range(2)))
    store = FeatureStore(server.url)
    partition = store.partition("clip")
    assert partition.snapshot() == 1 and same(partition, keys)
    fill(partition, [*keys, *KEYS], rows_per_shard=4)
    store.quarantine([{"image": "a.png", "sha256": None, "reason": "0 bytes", "expert": "clip"}])
    assert FeatureStore(server.url).quarantined()[0]["image"] == "a.png"
    assert list(store.verify()) == []
    store.gc(-60)
    left = objects(store)
    receipts = {name for name in left if "/receipts/" in name}
    assert len(receipts) == 15 and len({name for name in left if "/shards/" in name}) == 15, "every shard once"
    again = FeatureStore(server.url)
    assert len(again.partition("clip")) == 60 and same(again.partition("clip"), keys) and list(again.verify()) == []
    assert server.failed > 4


def test_damage_in_a_bucket(server):
    store = FeatureStore(server.url, create=True)
    partition = store.add_expert(describe())
    fill(partition, KEYS)
    [name, *_] = partition.storage.list_files("shards")
    whole = bytearray(partition.storage.read(f"shards/{name}"))
    whole[4100] ^= 1
    partition.storage.put(f"shards/{name}", [whole])
    damaged = list(store.verify())
    assert [found["shard"] for found in damaged] == [f"shards/{name}"]
    with pytest.raises(StoreError, match="verify"):
        partition.read([damaged[0]["key"]])
    assert store.withdraw(damaged) == 1
    assert FeatureStore(server.url).missing(KEYS, "clip") == [damaged[0]["key"]]
    fill(FeatureStore(server.url).partition("clip"), KEYS)
    assert list(store.verify()) == [] and same(FeatureStore(server.url).partition("clip"), KEYS)


def test_a_server_that_overwrites_is_refused(server):
    server.forgets_conditions = True
    with pytest.raises(StoreError, match="If-None-Match"):
        FeatureStore(server.url, create=True)
    assert ObjectStorage(server.url).list_files("") == []


def test_messages_name_the_store(server, monkeypatch):
    for url, said in [
        (server.url, "no feature store"),
        ("s3://nowhere-to-be-found/store", "no feature store"),
    ]:
        with pytest.raises(StoreError, match=said) as caught:
            FeatureStore(url)
        assert url in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(filesystem, "WAIT", tenacity.wait_fixed(0.01))
    with pytest.raises(StoreError, match="cannot write to store s3://nowhere-to-be-found"):
        FeatureStore("s3://nowhere-to-be-found/store", create=True)


def test_in_memory_and_in_forked_workers(server):
    for url in ("memory://place/store", server.url):
        store = FeatureStore(url, create=True)
        fill(store.add_expert(describe()), KEYS)
        store.partition("clip").snapshot()
        assert same(FeatureStore(url).partition("clip"), KEYS) and list(store.verify()) == []
        loader = torch.utils.data.DataLoader(Sums(store), batch_size=4, num_workers=1, multiprocessing_context="fork")
        assert torch.cat(list(loader)).tolist() == [row.tokens.sum() for row in features(KEYS).values()]
    assert store.gc(-60)["files"] == 0 and store.stat()["experts"]["clip"]["features"] == 20


class Sums(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(KEYS)

    def __getitem__(self, at):
        return self.store.partition("clip").read([KEYS[at]])[0].tokens.sum()
